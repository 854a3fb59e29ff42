"""What was wrong once heals: a Hub's wrong answers, partial files of other hosts, other programs in the same cache."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from model import hub as models
from model.errors import DbrxError, ModelError
from model.hub import partial, retry
from model.hub.layout import make_folder

from .cli import Cli
from .hub_server import FakeHub, checkpoint
from .test_hub import NAME, WANTED, Recorder, same
from .test_hub import server as hub_of_this_process
from .test_strangers import altered

SOAK = pytest.mark.soak
SHARD = "model-00002-of-00003.safetensors"
server = hub_of_this_process  # the fixture


# Wrong answers


def changed(path: str, **values: Any) -> Callable[[Any], Any]:
    """A listing in which one file's entry is another; None leaves a key out."""

    def alter(entries: Any) -> Any:
        return [
            {key: value for key, value in (entry | values).items() if value is not None}
            if entry["path"] == path
            else entry
            for entry in entries
        ]

    return alter


def more(*entries: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda listing: [*listing, *entries]


def only(*ends: str) -> Callable[[Any], Any]:
    return lambda listing: [entry for entry in listing if entry["path"].endswith(ends)]


def file(path: Any, size: Any = 2, oid: Any = "0" * 40) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": size, "oid": oid}


def lfs(**values: Any) -> Callable[[Any], Any]:
    good = {"oid": "a" * 64, "size": 100_000, "pointerSize": 130}
    return changed(SHARD, lfs=good | values)


LISTINGS: dict[str, Callable[[Any], Any]] = {
    "size is true": changed("config.json", size=True),
    "a file that is also a folder": more(file("a.json"), file("a.json/b.json")),
    "a file that is not there": more(file("absent.json")),
    "less than the index names": only("config.json", "index.json", "1-of-00003.safetensors"),
    "lfs is text": changed(SHARD, lfs="x"),
    "no weights": only("config.json"),
    "another checksum": lfs(),
    "nothing": lambda _: [],
    "size is text": changed("config.json", size="12"),
    "size is a float": changed("config.json", size=1.0),
    "size is negative": changed("config.json", size=-1),
    "size is missing": changed("config.json", size=None),
    "size is no number": changed("config.json", size=float("nan")),
    "size is huge": changed("config.json", size=1 << 60),
    "size is too small": lfs(size=99_999),
    "size is too large": lfs(size=100_001),
    "lfs size is true": lfs(size=True),
    "lfs is a list": changed(SHARD, lfs=[1]),
    "lfs oid is a number": lfs(oid=7),
    "lfs oid is a path": lfs(oid="../../x"),
    "lfs oid is too short": lfs(oid="a" * 40),
    "oid is missing": changed("config.json", oid=None),
    "oid is a number": changed("config.json", oid=5),
    "oid is text": changed("config.json", oid="x"),
    "oid in capitals": changed("config.json", oid="A" * 40),
    "path is a number": more(file(5)),
    "path is null": more(file(None)),
    "path leads up": more(file("../x.json")),
    "path is absolute": more(file("/etc/x.json")),
    "path in the bookkeeping": more(file(".cache/x.json")),
    "path with an escape": more(file("a\x1b.json")),
    "twice": more(file("config.json")),
    "a folder above that is a file": more(file("b.json"), file("b.json/c/d.json")),
    "a table": lambda _: {},
    "text": lambda _: "x",
    "null": lambda _: None,
    "numbers": lambda _: [1, 2],
    "nested too deeply": lambda _: [[[[]]]],
    "no types": lambda listing: [{key: value for key, value in each.items() if key != "type"} for each in listing],
    "no config": only(".safetensors", "index.json"),
    "the model of somebody else": lambda _: [file("other.json"), file("other.safetensors")],
}
REVISIONS: dict[str, Callable[[Any], Any]] = {
    f"sha: {value!r:.20}": lambda answer, value=value: answer | {"sha": value}  # type: ignore[misc]
    for value in ("0" * 40, None, 5, "main", "../../x", [], "A" * 40)
}
WRONG = [*(("tree", name) for name in LISTINGS), *(("revision", name) for name in REVISIONS)]
QUICK = 6


@pytest.mark.parametrize(
    ("into", "count"), [("cache", QUICK), *(pytest.param(into, len(WRONG), marks=SOAK) for into in ("cache", "folder"))]
)
def test_a_wrong_answer_is_not_kept(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, into: str, count: int
) -> None:
    """It ends in one clear line, and the next command succeeds, with or without `verify`."""
    monkeypatch.setattr(retry, "STALL_SECONDS", 0.1)
    content = checkpoint(shard_bytes=100_000)
    for i, (what, name) in enumerate(WRONG[:count]):
        repo, to = f"acme/wrong-{i}", tmp_path / str(i) if into == "folder" else None
        server.add(repo, content | {"extra.json": str(i).encode()})
        alter = LISTINGS[name] if what == "tree" else REVISIONS[name]
        server.alter = lambda answer, alter=alter, what=what: (  # type: ignore[misc]
            alter(answer) if isinstance(answer, list) == (what == "tree") else answer
        )
        with pytest.raises(DbrxError) as caught:
            models.download(repo, to=to)
        assert len(caught.value.message) < 400 and caught.value.message.isprintable(), name
        server.alter = None
        with monkeypatch.context() as usual:
            usual.setattr(retry, "STALL_SECONDS", 5)
            folder = models.download(repo, to=to, verify=i % 2 == 1)
        same(folder, content | {"extra.json": str(i).encode()}, WANTED | {"extra.json"})
        assert models.missing_files(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("count", [15, pytest.param(300, marks=[SOAK, pytest.mark.timeout(1800)])])
def test_odd_answers_are_told_and_heal(server: FakeHub, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Wrong values at random places; what an answer does not depend on may be anything, and may be missing."""
    monkeypatch.setattr(retry, "STALL_SECONDS", 0.1)
    chance, content = random.Random(count), checkpoint(shard_bytes=20_000)
    told = 0
    for i in range(count):
        repo = f"acme/odd-{i}"
        server.add(repo, content)
        what = chance.choice((dict, list))
        server.alter = lambda answer, what=what: altered(chance, answer) if isinstance(answer, what) else answer  # type: ignore[misc]
        try:
            models.download(repo)
            continue
        except DbrxError as fault:
            told += 1
            assert len(fault.one_line) < 600 and fault.one_line.isprintable() and fault.exit_code in (3, 7), fault
        server.alter = None
        with monkeypatch.context() as usual:
            usual.setattr(retry, "STALL_SECONDS", 5)
            same(models.download(repo), content, WANTED)
    assert told > count // 4


@pytest.mark.parametrize(
    ("endpoint", "code"),
    [
        ("http://h\x1b", 2),
        ("http://a b", 2),
        ("http://[", 2),
        ("http://h:99999", 2),
        ("ftp://h", 2),
        ("http://a..b", 7),
    ],
)
def test_an_endpoint_that_is_no_address(cli: Cli, monkeypatch: pytest.MonkeyPatch, endpoint: str, code: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    ran = cli("download", "acme/dbrx")
    assert ran.code == code and "HF_ENDPOINT" in ran.fault


def test_a_wrong_listing_that_another_program_kept(server: FakeHub, tmp_path: Path) -> None:
    folder = models.download(NAME)
    for path in (folder.parents[1] / "trees", folder.parents[1] / ".dbrx"):
        path.mkdir(exist_ok=True)
        entries = {SHARD: {"size": True, "blob_id": "0" * 40}, "absent.json": {"size": 2, "blob_id": "0" * 40}}
        (path / f"{folder.name}.json").write_text(json.dumps({"format_version": 1, "files": entries}))
    (folder / SHARD).unlink()
    same(models.download(NAME, revision=folder.name), checkpoint())
    assert models.missing_files(folder) == []


def test_the_file_that_is_not_there_is_named(server: FakeHub) -> None:
    server.alter = lambda answer: [*answer, file("absent.json")] if isinstance(answer, list) else answer
    with pytest.raises(ModelError, match=r"absent\.json"):
        models.download(NAME)
    server.alter = None
    server.add("acme/dbrx-gguf", {"config.json": b"{}", "model-Q4_K_M.gguf": b"x"})
    with pytest.raises(ModelError, match=r"model\.safetensors missing") as caught:
        models.download("acme/dbrx-gguf")
    assert "hf download acme/dbrx-gguf FILE.gguf" in str(caught.value.hint)


def test_what_a_server_says_shows_no_secret_and_no_control_characters(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    server.repos[NAME].refs |= dict.fromkeys(("hf_canary", "a\x1b]0;title\x07", "b\nc"), "0" * 40)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint.replace("//", "//user:secret@"))
    for name, revision in ((NAME, "v9"), ("acme/none", None)):
        with pytest.raises(DbrxError) as caught:
            models.download(name, revision=revision)
        told = caught.value.one_line
        assert told.isprintable() and "canary" not in told and "secret" not in told
    assert "[token]" in str(caught.value.hint) or "HF_ENDPOINT" in str(caught.value.hint)


# Partial files


def begun(name: str = "dbrx-0123abcd", at: int = 60_000) -> Path:
    """The partial file that a killed download left of a shard."""
    content = checkpoint()[SHARD]
    blobs = Path(constants.HF_HUB_CACHE) / "models--acme--tiny-dbrx" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    path = blobs / f"{hashlib.sha256(content).hexdigest()}.{name}.incomplete"
    path.write_bytes(content[:at])
    return path


def test_a_partial_file_of_any_host_and_process_is_continued(server: FakeHub) -> None:
    total = sum(len(checkpoint()[path]) for path in WANTED)
    for name in ("other-host-1", f"{platform.node()}-{os.getppid()}", "dbrx-0123abcd"):
        partial = begun(name)
        server.bytes_sent = 0
        folder = models.download(NAME)
        same(folder, checkpoint())
        assert server.bytes_sent == total - 60_000
        shutil.rmtree(partial.parents[1])
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_where_locks_do_not_hold_a_fresh_one_is_left_alone(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = begun()
    monkeypatch.setattr("model.hub.fetch._keeps_others_out", lambda _: False)
    seen: list[bool] = []
    server.watch = lambda _: seen.append(path.exists())
    folder = models.download(NAME)
    assert all(seen) and not path.exists()  # the file is whole now, and nobody needs it
    (folder / SHARD).resolve().unlink()
    begun()
    os.utime(path, (0, time.time() - 3 * partial.STALL_SECONDS))
    sent = server.bytes_sent
    same(models.download(NAME), checkpoint())
    assert server.bytes_sent - sent == 40_000


def test_what_is_planted_as_a_partial_file_is_not_written_to(server: FakeHub, tmp_path: Path) -> None:
    victim = tmp_path / "mine"
    victim.write_bytes(b"mine" * 10_000)
    path = begun()
    etag = path.name.split(".")[0]
    path.unlink()
    (path.with_name(f"{etag}.a-1.incomplete")).symlink_to(victim)
    os.link(victim, path.with_name(f"{etag}.a-2.incomplete"))
    os.mkfifo(path.with_name(f"{etag}.a-3.incomplete"))
    path.with_name(f"{etag}.a-4.incomplete").mkdir()
    same(models.download(NAME), checkpoint())
    assert victim.read_bytes() == b"mine" * 10_000


def test_partial_files_do_not_stay(server: FakeHub) -> None:
    """Neither of what another program completed, nor what was given up long ago; others stay."""
    path = begun()
    huggingface_hub.snapshot_download(NAME, endpoint=server.endpoint)
    assert path.exists()
    long_ago = path.with_name(f"{'a' * 64}.host-1.incomplete")
    long_ago.write_bytes(b"x")
    os.utime(long_ago, (0, time.time() - 2 * partial.ABANDONED_SECONDS))
    paused = path.with_name(f"{'b' * 64}.host-1.incomplete")
    paused.write_bytes(b"x")
    theirs = path.with_name(f"{'c' * 64}.0123abcd.incomplete")
    theirs.write_bytes(b"x")
    same_folder = models.download(NAME)
    assert models.verify_cached(same_folder) == []
    assert sorted(path.parent.glob("*.incomplete")) == [paused, theirs]


def test_a_folder_that_goes_away_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making a folder and looking whether it is one, another program may remove it, or the one above."""
    real, faults = Path.mkdir, [FileExistsError(17, "File exists"), FileNotFoundError(2, "No such file or directory")]

    def mkdir(path: Path, *args: Any, **options: Any) -> None:
        if faults:
            raise faults.pop()
        real(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    make_folder(tmp_path / "blobs")
    assert (tmp_path / "blobs").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


def test_a_folder_that_goes_before_a_file_is_in_it(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment between the two, which another program hardly ever meets."""
    gone: list[Path] = []

    def make_and_remove(path: Path) -> None:
        make_folder(path)
        if path.name == "blobs" and len(gone) < 2:
            path.rmdir()
            gone.append(path)

    monkeypatch.setattr(partial, "make_folder", make_and_remove)
    same(models.download(NAME, progress=Recorder(), workers=1), checkpoint())
    assert len(gone) == 2  # before it is looked for what is left of an earlier attempt, and before the file is made


def test_another_program_that_tidies_up_meanwhile(server: FakeHub) -> None:
    """As `hf cache prune` and `hf cache rm` do, in the middle of a file: it is written again, and all is whole."""
    server.pace = 0.001
    storage = Path(constants.HF_HUB_CACHE) / "models--acme--tiny-dbrx"
    for pattern in ("blobs/*.incomplete", "blobs", "snapshots/*", ""):
        tidied: list[Path] = []

        def tidy(sent: int, pattern: str = pattern, tidied: list[Path] = tidied) -> None:
            if sent >= 150_000:
                server.watch = None
                tidied += storage.glob(pattern) if pattern else [storage]
                for path in tidied:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

        server.bytes_sent, server.watch = 0, tidy
        progress = Recorder()
        folder = models.download(NAME, progress=progress)
        same(folder, checkpoint())
        assert models.resolve(NAME, download=False) == folder
        assert tidied or pattern == "snapshots/*"  # on a busy machine no file may be whole by then
        assert any("another program removed" in notice for notice in progress.notices) == bool(tidied)
        if pattern == "blobs/*.incomplete":  # what had come is not fetched again
            assert server.bytes_sent == sum(len(checkpoint()[name]) for name in WANTED)
        shutil.rmtree(storage)
