"""Downloads that go well, the cache that all Hub clients share, offline states, access, the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from filelock import FileLock
from huggingface_hub import constants

from model import hub as models
from model.errors import AccessError, ConnectionFault, InputError, ModelError, ResourceError
from model.hub import layout, retry

from .hub_server import ALWAYS, FakeHub, Fault, checkpoint, fake_hub

NAME = "acme/tiny-dbrx"
WANTED = {"config.json", "model.safetensors.index.json", "tokenizer_config.json", "README.md"} | {
    f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")
}


class Recorder:
    """A `Progress` that remembers."""

    def __init__(self) -> None:
        self.started: tuple[int, int, int] = (0, 0, 0)
        self.bytes: dict[str, int] = {}
        self.notices: list[str] = []

    def start(self, total_bytes: int, done_bytes: int, files: int) -> None:
        self.started = (total_bytes, done_bytes, files)

    def file(self, name: str, size: int, done: int) -> None:
        self.bytes[name] = done

    def advance(self, name: str, n_bytes: int) -> None:
        self.bytes[name] += n_bytes

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with one model, as the only Hub of this process; an empty cache, no token, quick patience."""
    with fake_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
        monkeypatch.setattr(retry, "STALL_SECONDS", 0.7)
        running.add(NAME, checkpoint())
        yield running
        huggingface_hub.close_session()


def same(folder: Path, content: dict[str, bytes], names: set[str] = WANTED) -> None:
    """Exactly these files, with these bytes."""
    assert set(layout.names_in(folder)) == names
    for name in names:
        assert (folder / name).read_bytes() == content[name], name


def test_download_into_the_cache(server: FakeHub, tmp_path: Path) -> None:
    progress = Recorder()
    folder = models.download(NAME, progress=progress)
    same(folder, checkpoint())
    total = sum(len(checkpoint()[name]) for name in WANTED)
    assert progress.started == (total, 0, len(WANTED))
    assert progress.bytes == {name: len(checkpoint()[name]) for name in WANTED}
    assert server.bytes_sent == total
    assert models.missing_files(folder) == []
    assert not list(tmp_path.rglob("*.incomplete")) and not list(tmp_path.rglob("*.tmp"))
    # A second time nothing but the commit is asked for; with a pinned commit nothing at all.
    asked = len(server.seen)
    assert models.download(NAME) == folder
    assert [seen.path for seen in server.seen[asked:]] == [f"/api/models/{NAME}/revision/main"]
    assert models.download(NAME, revision=folder.name) == folder
    assert len(server.seen) == asked + 1


def test_download_into_a_folder(server: FakeHub, tmp_path: Path) -> None:
    folder = models.download(NAME, to=tmp_path / "here")
    assert folder == tmp_path / "here"
    same(folder, checkpoint())
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert not (tmp_path / "cache").exists()
    sent = server.bytes_sent
    models.download(NAME, to=folder)
    assert server.bytes_sent == sent
    # Another commit whose shards have the same sizes is told apart.
    server.add(NAME, checkpoint(seed=1))
    same(models.download(NAME, to=folder), checkpoint(seed=1))


def test_files_put_into_the_folder_by_other_means_are_judged_by_checksum(server: FakeHub, tmp_path: Path) -> None:
    shards = sorted(name for name in WANTED if name.endswith(".safetensors"))
    (tmp_path / shards[0]).write_bytes(checkpoint()[shards[0]])
    (tmp_path / shards[1]).write_bytes(b"?" * len(checkpoint()[shards[1]]))
    progress = Recorder()
    same_folder = models.download(NAME, to=tmp_path, progress=progress)
    assert progress.started[1] == len(checkpoint()[shards[0]])
    for name in WANTED:
        assert (same_folder / name).read_bytes() == checkpoint()[name]


def test_the_cache_serves_other_clients(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.download(NAME)
    sent = server.bytes_sent
    patterns = list(models.CHECKPOINT_PATTERNS)
    assert huggingface_hub.snapshot_download(NAME, endpoint=server.endpoint, allow_patterns=patterns) == str(folder)
    assert server.bytes_sent == sent
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert huggingface_hub.snapshot_download(NAME, allow_patterns=patterns) == str(folder)
    assert huggingface_hub.try_to_load_from_cache(NAME, "config.json") == str(folder / "config.json")
    cached = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    assert [repo.repo_id for repo in cached.repos] == [NAME] and not cached.warnings


def test_the_cache_of_other_clients_serves(server: FakeHub) -> None:
    folder = Path(
        huggingface_hub.snapshot_download(
            NAME, endpoint=server.endpoint, allow_patterns=list(models.CHECKPOINT_PATTERNS)
        )
    )
    sent = server.bytes_sent
    assert models.download(NAME, verify=True) == folder
    assert models.resolve(NAME, download=False) == folder
    assert server.bytes_sent == sent


def test_a_folder_of_other_clients_serves(server: FakeHub, tmp_path: Path) -> None:
    patterns = list(models.CHECKPOINT_PATTERNS)
    huggingface_hub.snapshot_download(
        NAME, endpoint=server.endpoint, allow_patterns=patterns, local_dir=tmp_path / "theirs"
    )
    sent = server.bytes_sent
    models.download(NAME, to=tmp_path / "theirs")
    assert server.bytes_sent == sent
    models.download(NAME, to=tmp_path / "ours")
    sent = server.bytes_sent
    huggingface_hub.snapshot_download(
        NAME, endpoint=server.endpoint, allow_patterns=patterns, local_dir=tmp_path / "ours"
    )
    assert server.bytes_sent == sent


def test_plan_says_what_is_there(server: FakeHub) -> None:
    first = models.plan_download(NAME)
    assert {file.path for file in first.files} == WANTED and not any(file.present for file in first.files)
    assert first.missing_bytes == first.total_bytes
    shard = next(file for file in first.files if file.path.endswith(".safetensors"))
    assert shard.sha256 == hashlib.sha256(checkpoint()[shard.path]).hexdigest()
    assert not Path(constants.HF_HUB_CACHE).exists()
    folder = models.download(NAME, patterns=["*.json"])
    assert set(layout.names_in(folder)) == {name for name in WANTED if name.endswith(".json")}
    second = models.plan_download(NAME)
    assert {file.path for file in second.files if file.present} == set(layout.names_in(folder))
    assert second.commit == folder.name and second.folder == folder


def test_a_listing_in_pages(server: FakeHub) -> None:
    server.page_size = 2
    same(models.download(NAME), checkpoint())
    assert sum("/tree/" in seen.path for seen in server.seen) == 5


def test_a_commit_that_changes_in_between(server: FakeHub) -> None:
    """All files are of the commit that the branch pointed to first."""
    server.watch = lambda n: print(server.add(NAME, checkpoint(seed=1)))
    same(models.download(NAME), checkpoint())
    server.watch = None
    same(models.download(NAME), checkpoint(seed=1))


@pytest.mark.slow
def test_an_update_that_fails_leaves_the_old_snapshot_in_use(server: FakeHub) -> None:
    old = models.download(NAME)
    server.add(NAME, checkpoint(seed=1))
    server.repos[NAME].faults = [Fault("close", at=10, times=ALWAYS, path="model-00002-of-00003.safetensors")]
    with pytest.raises(ConnectionFault):
        models.download(NAME)
    assert models.resolve(NAME, download=False) == old
    progress = Recorder()
    assert models.resolve(NAME, progress=progress) == old
    assert "earlier download" in progress.notices[0] and old.name[:12] in progress.notices[0]


def test_waiting_for_another_process_is_announced(server: FakeHub) -> None:
    shard = next(file for file in models.plan_download(NAME).files if file.path.endswith(".safetensors"))
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / "models--acme--tiny-dbrx" / f"{shard.etag}.lock"
    lock.parent.mkdir(parents=True)
    other = FileLock(lock, thread_local=False)
    other.acquire()
    threading.Timer(0.6, other.release).start()
    progress = Recorder()
    same(models.download(NAME, progress=progress), checkpoint())
    assert progress.notices == [f"{shard.path}: another process fetches it, waiting"]


# Names, offline, access


def test_local_names(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "tiny-dbrx").mkdir(parents=True)
    assert models.resolve(NAME) == Path(NAME)
    assert models.resolve(tmp_path) == tmp_path
    for name in ("./nothing", "/nothing", "~/nothing-here", "a/b/c", "x/y.gguf", Path("a/b")):
        with pytest.raises(ModelError, match=r"does not exist"):
            models.resolve(name)
    for name in ("nothing", "a b/c", "-/x", ""):
        with pytest.raises(ModelError):
            models.resolve(name) if name else models.download(name)
    with pytest.raises(InputError):
        models.download(NAME, revision="../../etc")
    assert not server.seen


def test_without_download_nothing_touches_the_network(server: FakeHub) -> None:
    with pytest.raises(ModelError, match="not on this machine") as caught:
        models.resolve(NAME, download=False)
    assert caught.value.hint == f"to fetch it: dbrx download {NAME}"
    with pytest.raises(ModelError, match="revision v2") as caught:
        models.resolve(NAME, revision="v2", download=False)
    assert str(caught.value.hint).endswith("--revision v2")
    assert not server.seen
    folder = models.download(NAME)
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    os.truncate(shard, len(whole) - 1)
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors missing"):
        models.resolve(NAME, download=False)
    shard.unlink()
    assert models.missing_files(folder) == [shard.name]
    same(models.resolve(NAME), checkpoint())


@pytest.mark.parametrize("state", ["nothing", "some", "all"])
def test_offline(server: FakeHub, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    if state != "nothing":
        models.download(NAME, patterns=["*.json", "*1-of*"] if state == "some" else None)
    asked = len(server.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if state == "all":
        progress = Recorder()
        same(models.resolve(NAME), checkpoint())
        same(models.download(NAME, progress=progress), checkpoint())
        assert "HF_HUB_OFFLINE" in progress.notices[0]
    else:
        told = "not on this machine" if state == "nothing" else "model-00002-of-00003.safetensors"
        for function in (models.resolve, models.download):
            with pytest.raises(ModelError, match=told) as caught:
                function(NAME)
            assert "HF_HUB_OFFLINE" in str(caught.value.hint)
    with pytest.raises(ConnectionFault, match="HF_HUB_OFFLINE"):
        models.plan_download(NAME)
    assert len(server.seen) == asked


def test_offline_a_plain_folder_is_enough(server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models.download(NAME, to=tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    progress = Recorder()
    assert models.download(NAME, to=tmp_path / "here", progress=progress, verify=True) == tmp_path / "here"
    assert "here holds is used" in progress.notices[0]
    for to, revision in ((tmp_path / "else", None), (tmp_path / "here", "another")):
        with pytest.raises(ModelError, match="not on this machine"):
            models.download(NAME, to=to, revision=revision)
    (tmp_path / "here" / "config.json").unlink()
    with pytest.raises(ModelError, match="not on this machine"):
        models.download(NAME, to=tmp_path / "here")


def test_no_network(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.download(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    progress = Recorder()
    assert models.resolve(NAME, progress=progress) == folder
    assert "127.0.0.1 cannot be reached" in progress.notices[0]
    with pytest.raises(ConnectionFault, match="cannot be reached"):
        models.download(NAME)
    with pytest.raises(ConnectionFault, match="cannot be reached"):
        models.resolve("acme/other")


def test_no_such_revision_names_those_that_exist(server: FakeHub) -> None:
    server.add(NAME, checkpoint(seed=1), revision="v1")
    with pytest.raises(ModelError, match="Invalid rev id: v9") as caught:
        models.download(NAME, revision="v9")
    assert caught.value.hint == f"revisions of {NAME}: main, v1"
    same(models.download(NAME, revision="v1"), checkpoint(seed=1))
    assert models.resolve(NAME, revision="v1", download=False).is_dir()


@pytest.mark.parametrize("name", ["acme/closed", "databricks/dbrx-instruct"])
@pytest.mark.parametrize("code", ["", "RepoNotFound", "GatedRepo"])
def test_no_access(server: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    server.add(name, checkpoint())
    status = 403 if code == "GatedRepo" else 401
    headers = {"X-Error-Code": code, "X-Error-Message": "Access to it is restricted."}
    server.repos[name].faults = [Fault("status", "revision", at=status, times=ALWAYS, headers=headers)]
    with pytest.raises(AccessError, match=rf"{status} \(Access to it is restricted") as caught:
        models.download(name)
    hint = str(caught.value.hint)
    assert caught.value.exit_code == 4
    assert "local folder" in hint and "HF_ENDPOINT" in hint and "HF_TOKEN" in hint
    assert ("ask for access at" in hint) == (code == "GatedRepo" and name.startswith("acme/"))
    assert "licen" not in (hint + caught.value.message).lower()
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    with pytest.raises(AccessError) as caught:
        models.download(name)
    assert "no HF_TOKEN" not in str(caught.value.hint)


def test_access_lost_after_the_download_is_announced(server: FakeHub) -> None:
    folder = models.download(NAME)
    del server.repos[NAME]
    progress = Recorder()
    assert models.resolve(NAME, progress=progress) == folder
    assert "gives no access" in progress.notices[0]


@pytest.mark.parametrize("path", ["../../escape.json", "/etc/escape.json", "a/../../escape.json", ".cache/x.json"])
def test_a_listing_that_leads_out_of_the_folder(server: FakeHub, tmp_path: Path, path: str) -> None:
    server.add(NAME, checkpoint() | {path: b"{}"})
    with pytest.raises(ModelError, match="unsafe file name"):
        models.download(NAME, to=tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("*escape*"))


# The disk


def test_no_room_is_told_before_the_first_byte(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 200_000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    with pytest.raises(ResourceError, match=r"300\.2 kB more on disk, .* has 200\.0 kB free") as caught:
        models.download(NAME)
    assert caught.value.exit_code == 5
    assert server.bytes_sent == 0 and not Path(constants.HF_HUB_CACHE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_disk_that_fills_up(server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str) -> None:
    """ENOSPC at the nth write, for every n: exit code 5, nothing bad under a final name, and it resumes."""
    writes, limit = 0, 0

    def full(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return write

    for module, name in ((os, "pwrite"), (os, "fsync"), (os, "symlink"), (Path, "write_text"), (Path, "mkdir")):
        monkeypatch.setattr(module, name, full(getattr(module, name)))
    whole = checkpoint(shards=1, shard_bytes=20_000)
    wanted = {"config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"}
    content = {name: whole[name] for name in wanted}
    server.add(NAME, content)
    failures, done = 0, False
    while not done:
        writes, limit = 0, failures + 1
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{limit}"))
        to = tmp_path / f"folder-{limit}" if where == "folder" else None
        try:
            models.download(NAME, to=to, workers=1)
            done = True
        except ResourceError as error:
            failures += 1
            assert "disk is full" in error.message
            for path in (to or tmp_path / f"cache-{limit}").rglob("*.*"):
                if path.name in wanted and path.is_file():
                    assert path.read_bytes() == content[path.name]
            same(models.download(NAME, to=to), content, wanted)
    assert failures > 20


# At rest


def test_damage_at_rest_is_found_and_healed(server: FakeHub, tmp_path: Path) -> None:
    folders = {None: models.download(NAME), tmp_path / "here": models.download(NAME, to=tmp_path / "here")}
    for to, folder in folders.items():
        assert models.verify_cached(folder) == []
        for name in ("model-00001-of-00003.safetensors", "config.json"):
            blob = (folder / name).resolve()
            damaged = bytearray(blob.read_bytes())
            damaged[len(damaged) // 2] ^= 16
            times = blob.stat()
            blob.write_bytes(damaged)
            os.utime(blob, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a failing disk would do it
            assert [str(problem) for problem in models.verify_cached(folder)] == [f"{name} (wrong checksum)"]
            with pytest.raises(ModelError, match=f"1 damaged file in .*, now removed: {name}") as caught:
                models.download(NAME, to=to, verify=True)
            assert caught.value.exit_code == 3
            same(models.download(NAME, to=to, verify=True), checkpoint())


def test_missing_files_without_a_listing(tmp_path: Path) -> None:
    """A folder that was put together by hand."""
    assert models.missing_files(tmp_path) == ["config.json", "model.safetensors"]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert models.missing_files(tmp_path) == []
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../../etc/passwd"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert models.missing_files(tmp_path) == ["model-1.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text("[")
    assert models.missing_files(tmp_path) == ["model.safetensors.index.json (cannot be read)"]
    assert models.missing_files(tmp_path, ["*.tiktoken"]) == ["*.tiktoken"]
    assert models.missing_files(tmp_path, ["config.*"]) == []


def test_import_is_light() -> None:
    code = "import sys, model.hub; print([m for m in ('torch', 'huggingface_hub', 'httpx2') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
