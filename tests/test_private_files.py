"""Promises 25 and 31: files that hold words are the user's alone, and what was planted in their place stays."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dbrx_cli import private
from dbrx_cli.answers import AnswerFile
from model.errors import DbrxError, InputError, ResourceError
from tests.cli import Cli


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def answers(path: Path) -> None:
    AnswerFile(path, {}, "m").close()


WRITERS: list[Callable[[Path], object]] = [
    lambda path: private.write_private(path, "words", over=True),
    lambda path: private.write_private(path, "words", over=False),
    answers,
]


def link(path: Path) -> None:
    path.symlink_to(path.with_name("victim"))


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def loop(path: Path) -> None:
    path.symlink_to(path)


def link_to_folder(path: Path) -> None:
    path.symlink_to(path.parent)


PLANTED = [link, dangling, loop, link_to_folder, os.mkfifo, Path.mkdir]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("write", WRITERS, ids=["over", "new", "answers"])
def test_what_is_planted_stays(
    tmp_path: Path, plant: Callable[[Path], object], write: Callable[[Path], object]
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    plant(tmp_path / "out.md")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DbrxError, match=r"out\.md"):
        write(tmp_path / "out.md")
    assert victim.read_text() == "mine" and sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("write", WRITERS, ids=["over", "new", "answers"])
def test_a_new_file_is_private_under_any_umask(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "out.md")
    assert stat.S_IMODE((tmp_path / "out.md").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["out.md"]


def test_what_was_there_gives_way_as_a_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.md"
    file.write_text("before")
    with pytest.raises(InputError, match="is there already"):
        private.write_private(file, "after", over=False)
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="No space left"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(full))
        private.write_private(file, "after", over=True)
    assert file.read_text() == "before" and os.listdir(tmp_path) == ["out.md"]
    private.write_private(file, "after", over=True)
    assert file.read_text() == "after" and stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702, 0o720, 0o1777])
def test_folders_where_others_can_write_hold_nothing_private(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(DbrxError, match="can write to") as caught:
        private.private_folder(folder)
    assert """chmod go-w '""" in (caught.value.hint or "")
    folder.chmod(0o755)
    assert private.private_folder(folder) == folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_holds_nothing_private(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(DbrxError, match="belongs to another user"):
        private.private_folder(tmp_path)


@pytest.mark.parametrize("variable", ["DBRX_DATA", "DBRX_CONFIG"])
def test_a_home_that_nobody_has(cli: Cli, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "~nobody-has-this-name/x")
    run = cli("sessions", "list")
    assert run.code == 2 and variable in run.fault and "no such user" in run.fault


@pytest.mark.parametrize("kind", ["pipe", "zeros", "large"])
def test_settings_that_are_no_small_plain_file(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file = Path("/dev/zero") if kind == "zeros" else tmp_path / "config.toml"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "large":
        file.write_text("# " + "x" * 2**20)
    monkeypatch.setenv("DBRX_CONFIG", str(file))
    run = cli("config", "show")
    assert run.code == 2 and str(file) in run.fault and "DBRX_CONFIG" in run.fault
