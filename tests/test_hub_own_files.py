"""`download --to`: what is the user's own in that folder is never replaced, removed or followed without a word."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from model import hub as models
from model.errors import InputError, ModelError

from .hub_server import FakeHub, checkpoint
from .test_hub import NAME, Recorder, same
from .test_hub import server as hub_of_this_process

server = hub_of_this_process  # the fixture
SHARD = "model-00002-of-00003.safetensors"
MINE = b"# My notes\n"


def link(path: Path) -> None:
    path.with_name("elsewhere").write_bytes(MINE)
    path.symlink_to("elsewhere")


def folder_link(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    target.mkdir()
    path.symlink_to(target)


OWN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file": ("README.md", lambda path: path.write_bytes(MINE)),
    "an empty file": ("config.json", lambda path: path.write_bytes(b"")),
    "weights": (SHARD, lambda path: path.write_bytes(MINE)),
    "a link": ("README.md", link),
    "a dangling link": ("config.json", lambda path: path.symlink_to("nothing")),
    "a folder": ("config.json", Path.mkdir),
    "a pipe": ("config.json", os.mkfifo),
    "a link to a folder, where a folder goes": (".cache", folder_link),
    "a file, where a folder goes": (".cache", lambda path: path.write_bytes(MINE)),
}


def test_what_is_there_is_refused_before_the_first_byte(server: FakeHub, tmp_path: Path) -> None:
    for case, (name, make) in OWN.items():
        here = tmp_path / case / "here"
        here.mkdir(parents=True)
        make(here / name)
        before = {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in here.iterdir()}
        for verify in (False, True):
            with pytest.raises(InputError, match=name) as caught:
                models.download(NAME, to=here, verify=verify)
            assert "move it away" in str(caught.value.hint)
        assert {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in here.iterdir()} == before
    assert server.bytes_sent == 0


def test_the_folder_itself_is_a_file(server: FakeHub, tmp_path: Path) -> None:
    for name, make in {"file": lambda path: path.write_bytes(MINE), "dangling": lambda p: p.symlink_to("no")}.items():
        make(tmp_path / name)
        with pytest.raises(InputError, match="is not a folder"):
            models.download(NAME, to=tmp_path / name)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    same(models.download(NAME, to=tmp_path / "link"), checkpoint())


def test_links_of_the_cache_are_not_written_through(server: FakeHub, tmp_path: Path) -> None:
    """But the model's whole folder may lie on another disk."""
    storage = Path(constants.HF_HUB_CACHE) / "models--acme--tiny-dbrx"
    commit = server.repos[NAME].refs["main"]
    (tmp_path / "mine").mkdir()
    for name in ("main", "config.json", f"{commit}.json"):
        (tmp_path / "mine" / name).write_bytes(MINE)
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    for place in ("refs", "blobs", "snapshots", f"snapshots/{commit}", ".dbrx"):
        (storage / place).parent.mkdir(parents=True)
        (storage / place).symlink_to(tmp_path / "mine")
        with pytest.raises(InputError, match="link out of the cache"):
            models.download(NAME)
        shutil.rmtree(storage)
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before
    (tmp_path / "disk" / storage.name).mkdir(parents=True)
    storage.symlink_to(tmp_path / "disk" / storage.name)
    same(models.download(NAME), checkpoint())


@pytest.mark.timeout(20)
def test_pipes_do_not_block(server: FakeHub, tmp_path: Path) -> None:
    folder, here = models.download(NAME), models.download(NAME, to=tmp_path / "here")
    notes = here / ".cache" / "huggingface"
    for path in (
        folder.parents[1] / "refs" / "main", folder.parents[1] / ".dbrx" / f"{folder.name}.json",
        folder / "model.safetensors.index.json", notes / ".dbrx" / f"{folder.name}.json",
        notes / "download" / "README.md.metadata",
    ):  # fmt: skip
        path.unlink()
        os.mkfifo(path)
    models.missing_files(folder), models.missing_files(here)
    same(models.download(NAME, verify=True), checkpoint())
    same(models.download(NAME, to=here, verify=True), checkpoint())


def test_what_a_download_put_there_is_updated(server: FakeHub, tmp_path: Path) -> None:
    """By this program or by huggingface_hub; a file that has the right content is as good as downloaded."""
    huggingface_hub.snapshot_download(NAME, endpoint=server.endpoint, local_dir=tmp_path / "theirs")
    (tmp_path / "mine").mkdir()
    for name, content in checkpoint().items():
        (tmp_path / "mine" / name).write_bytes(content)
    for folder in ("theirs", "mine", "ours"):
        models.download(NAME, to=tmp_path / folder)
    server.add(NAME, checkpoint(seed=1) | {"README.md": b"# Another text\n"})
    for folder in ("theirs", "mine", "ours"):
        models.download(NAME, to=tmp_path / folder)
        assert (tmp_path / folder / "README.md").read_bytes() == b"# Another text\n"
        assert (tmp_path / folder / SHARD).read_bytes() == checkpoint(seed=1)[SHARD]


def test_what_was_changed_since_is_refused_and_with_verify_set_aside(server: FakeHub, tmp_path: Path) -> None:
    models.download(NAME, to=tmp_path)
    config = tmp_path / "config.json"
    config.write_bytes(MINE)
    with pytest.raises(InputError, match="was changed since") as caught:
        models.download(NAME, to=tmp_path)
    assert "--verify" in str(caught.value.hint) and config.read_bytes() == MINE
    progress = Recorder()
    models.download(NAME, to=tmp_path, verify=True, progress=progress)
    assert (tmp_path / "config.json.changed-1").read_bytes() == MINE
    assert config.read_bytes() == checkpoint()["config.json"]
    server.add(NAME, checkpoint(seed=1))  # nothing is set aside where something else is refused
    config.write_bytes(MINE)
    (tmp_path / "README.md").write_bytes(MINE)
    (tmp_path / ".cache/huggingface/download/README.md.metadata").unlink()
    with pytest.raises(InputError, match="not downloaded"):
        models.download(NAME, to=tmp_path, verify=True)
    assert config.read_bytes() == MINE
    assert progress.notices == ["config.json is not what the Hub has: kept as config.json.changed-1, and fetched anew"]


def test_a_flip_at_rest_is_named_whatever_the_time_says(server: FakeHub, tmp_path: Path) -> None:
    models.download(NAME, to=tmp_path)
    for later in (0, 100):
        path = tmp_path / SHARD
        data = bytearray(path.read_bytes())
        data[777] ^= 4
        path.write_bytes(data)
        os.utime(path, (0, path.stat().st_mtime + later))
        progress = Recorder()
        try:
            models.download(NAME, to=tmp_path, verify=True, progress=progress)
            assert SHARD in progress.notices[0]
        except ModelError as error:
            assert SHARD in error.message
        models.download(NAME, to=tmp_path, verify=True)
        assert path.read_bytes() == checkpoint()[SHARD]


def test_a_file_that_appears_while_others_come(server: FakeHub, tmp_path: Path) -> None:
    def write(sent: int) -> None:
        if sent > 10_000:
            server.watch = None
            for path in (tmp_path / name for name in checkpoint()):
                if not path.exists():
                    path.write_bytes(MINE)

    server.pace, server.watch = 0.001, write
    with pytest.raises(InputError, match="not downloaded"):
        models.download(NAME, to=tmp_path)
    assert (tmp_path / SHARD).read_bytes() == MINE


def test_verify_judges_only_what_was_downloaded(server: FakeHub, tmp_path: Path) -> None:
    models.download(NAME, to=tmp_path)
    (tmp_path / "modeling_dbrx.py").write_bytes(MINE)  # listed, and never fetched
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "model.safetensors").write_bytes(MINE)
    models.download(NAME, to=tmp_path, verify=True)
    assert (tmp_path / "modeling_dbrx.py").read_bytes() == MINE


@pytest.mark.parametrize("where", ["cache", "folder"])
def test_verify_removes_no_file_that_a_link_leads_to(server: FakeHub, tmp_path: Path, where: str) -> None:
    to = tmp_path / "here" if where == "folder" else None
    path = models.download(NAME, to=to) / SHARD
    mine = tmp_path / "mine"
    mine.write_bytes(b"?" * len(checkpoint()[SHARD]))
    os.utime(mine, (0, 0))
    path.unlink()
    path.symlink_to(mine)
    with pytest.raises(ModelError, match=SHARD):
        models.download(NAME, to=to, verify=True)
    assert mine.read_bytes() == b"?" * len(checkpoint()[SHARD]) and not path.is_symlink()
    same(models.download(NAME, to=to, verify=True), checkpoint())


def test_offline_no_folder_is_made_from_the_cache(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.download(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nothing is fetched into") as caught:
        models.download(NAME, to=tmp_path / "it's here")
    assert not (tmp_path / "it's here").exists()
    command = str(caught.value.hint).partition("cp ")[2]
    assert os.system(f"cp {command}") == 0
    same(tmp_path / "it's here", checkpoint())
    assert folder.is_dir()
    with pytest.raises(ModelError, match="not on this machine"):
        models.download("acme/other", to=tmp_path / "other")
