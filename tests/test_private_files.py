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
    with pytest.raises(InputError, match=r"out\.md"):  # whatever it is: exit 2
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


@pytest.mark.parametrize("command", [("bench", "--plot"), ("trace", "hi", "--html")])
def test_a_picture_takes_no_name_that_is_there(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    """Told before there is a model, and quiet or not."""
    file = tmp_path / "mine"
    file.write_text("mine")
    result = cli(*command, file, "-q", "-m", tmp_path / "no-model")
    assert (result.code, result.out, file.read_text()) == (2, "", "mine")
    assert f"{file} is there already; take another name" in result.fault


def test_a_name_with_a_nul_is_refused(tmp_path: Path) -> None:
    for over in (True, False):
        with pytest.raises(InputError, match="no name of a file"):
            private.write_private(tmp_path / "a\0b", "words", over=over)


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


@pytest.mark.parametrize(
    ("variable", "value", "code", "why"),
    [
        ("DBRX_CONFIG", "a" * 5000, 2, "File name too long"),
        ("DBRX_DATA", "a" * 5000, 1, "File name too long"),
        ("DBRX_MODEL", "a" * 5000, 3, "nor a Hub id"),
        ("DBRX_ADAPTER", "a" * 5000, 3, "holds no adapter_config.json"),
        ("DBRX_EXPERT_CACHE", "9" * 5000, 2, "is not a size"),
    ],
)
def test_values_of_thousands_of_characters(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, variable: str, value: str, code: int, why: str
) -> None:
    monkeypatch.setenv(variable, value)
    model = () if variable == "DBRX_MODEL" else ("-m", tiny_checkpoint)
    run = cli("sessions", "list") if variable == "DBRX_DATA" else cli("generate", "-q", "--no-log", *model, "hi")
    assert run.code == code and why in run.fault and len(run.fault) < 1000


def test_a_data_folder_whose_name_is_no_text(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBRX_DATA", str(tmp_path / "a\udcffb"))
    assert cli("sessions", "list").code == 0


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


def writable(mode: int) -> Callable[[Path], None]:
    return lambda file: file.parent.chmod(mode)


def file_for_all(file: Path) -> None:
    file.chmod(0o666)


def file_of_another(file: Path) -> None:
    os.chown(file, 65534, 65534)


def folder_of_another(file: Path) -> None:
    os.chown(file.parent, 65534, 65534)


def link_of_another(file: Path) -> None:
    file.rename(file.with_name("kept"))
    file.symlink_to("kept")
    os.chown(file, 65534, 65534, follow_symlinks=False)


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
HANDS = [
    *(pytest.param(writable(mode), id=f"{mode:o}") for mode in (0o777, 0o1777, 0o757, 0o703)),
    file_for_all,
    *(pytest.param(each, marks=AS_ROOT) for each in (file_of_another, folder_of_another, link_of_another)),
]


@pytest.mark.parametrize("hands", HANDS)
@pytest.mark.parametrize("what", ["settings", "prompt cache", "resume", "demo"])
def test_what_others_can_write_is_not_used(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    what: str, hands: Callable[[Path], None],
) -> None:  # fmt: skip
    """Who can write them says where prompts go, or what the model has read."""
    file = tmp_path / "planted" / {"settings": "config.toml", "demo": "source.json"}.get(what, "saved.kv")
    file.parent.mkdir()
    file.write_text("seed = 1\n" if what == "settings" else "{}" if what == "demo" else "")
    hands(file)
    if what == "demo":
        from dbrx_cli import demo

        monkeypatch.setattr(demo, "read_json", lambda path: pytest.fail("it was read"))
        monkeypatch.setattr(demo, "demo_folder", lambda name: file.parent)
        assert not demo.is_complete()
        return
    if what == "settings":
        monkeypatch.setenv("DBRX_CONFIG", str(file))
        ran = cli("config", "show")
    else:
        flag = "--" + what.replace(" ", "-")
        ran = cli("generate", "--no-log", "-m", tiny_checkpoint, "-n", "1", flag, file, "hi")
    assert ran.code in (1, 2) and str(file.parent) in ran.fault
    assert any(why in ran.fault for why in ("others can write", "another user", "somebody else", "is a link"))


def test_no_module_beside_the_user_takes_the_place_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dbrx_cli.demo import _download
    from model.errors import ConnectionFault

    (tmp_path / "pip.py").write_text("open('PWNED', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConnectionFault, match="pip could not fetch"):
        _download(tmp_path, "demo")
    assert not (tmp_path / "PWNED").exists()
