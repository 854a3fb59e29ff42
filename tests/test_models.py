"""`dbrx models`: what the Hub's cache holds, and that removing takes what it says and nothing else."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest
from huggingface_hub import constants, scan_cache_dir

from dbrx_cli.commands.models import _print_table, _to_remove
from dbrx_cli.options import DEMOS
from model.errors import InputError, ModelError
from model.hub import inventory
from model.hub.layout import CacheSnapshot, write_ref, write_tree
from model.hub.listing import HubFile
from tests.cli import Cli
from tests.hub_server import checkpoint, git_id
from tests.terminal import spawn
from tests.test_imports import loaded_by

NAME = "acme/tiny-dbrx"
Add = Callable[..., str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no demo model."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DBRX_CACHE", str(tmp_path / "dbrx"))
    return tmp_path / "hub"


@pytest.fixture
def add() -> Add:
    """Puts a snapshot into the cache as a download would; `leave_out` files are still to come."""

    def put(name: str, files: dict[str, bytes], ref: str | None = "main", leave_out: tuple[str, ...] = ()) -> str:
        commit = git_id(json.dumps(sorted((path, git_id(data)) for path, data in files.items())).encode())
        place = CacheSnapshot(name, commit)
        listed = [HubFile.checked(path, len(data), git_id(data), None) for path, data in files.items()]
        for file in listed:
            if file.path not in leave_out:
                place.scratch.mkdir(parents=True, exist_ok=True)
                place.blob(file).write_bytes(files[file.path])
                place.publish(file)
        write_tree(place.tree_path, listed)
        if ref:
            write_ref(place.storage, ref, commit)
        return commit

    return put


def listed(cli: Cli) -> list[dict[str, Any]]:
    result = cli("models", "list", "--json")
    assert (result.code, result.err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(result.out)
    return rows


def test_only_dbrx_checkpoints_are_listed(cli: Cli, add: Add, cache: Path) -> None:
    commit = add(NAME, checkpoint())
    add("acme/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    (row,) = listed(cli)
    assert (row["name"], row["revision"], row["refs"], row["complete"]) == (NAME, commit, ["main"], True)
    assert row["bytes"] == sum(map(len, checkpoint().values()))
    assert row["bytes"] == next(r.size_on_disk for r in scan_cache_dir(cache).repos if r.repo_id == NAME)
    assert row["missing"] == [] and row["last_used"].endswith("+00:00") and Path(row["path"]).is_dir()
    fields = cli("models").out.rstrip("\n").split("\t")
    assert fields[:4] == [NAME, commit, str(row["bytes"]), "complete"] and fields[5] == row["path"]


def test_speed_is_a_column_of_a_pipe_too(cli: Cli, add: Add, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(NAME, checkpoint())
    monkeypatch.setattr("dbrx_cli.commands.models._predicted", lambda row: 12.34)
    assert cli("models", "list", "--speed").out.rstrip("\n").split("\t")[-1] == "12"
    assert len(cli("models", "list").out.split("\t")) == 6
    assert cli("models", "--speed").out == cli("models", "list", "--speed").out  # as `dbrx models` alone


@pytest.mark.parametrize("columns, speed", [(80, True), (40, True), (40, False)])
def test_the_table_breaks_no_number(monkeypatch: pytest.MonkeyPatch, columns: int, speed: bool) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    row = {"name": "demo-moe", "refs": [], "revision": None, "bytes": 918_120_854, "form": "bfloat16", "path": "/x"}
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    _print_table([row | {"complete": True, "fits": True} | ({"tokens_per_s": 27.3} if speed else {})])
    head, cells = out.getvalue().splitlines()
    assert "918.1 MB" in cells and "in memory" in cells and ("tokens/s" in head) == speed
    assert ("bfloat16" in cells) == (columns == 80 or not speed)


def test_what_is_incomplete_is_told(cli: Cli, add: Add, cache: Path) -> None:
    add(NAME, checkpoint(), leave_out=("model-00002-of-00003.safetensors",))
    (cache / "models--acme--dbrx-begun" / "blobs").mkdir(parents=True)
    (cache / "models--acme--dbrx-begun" / "blobs" / "abc.1.incomplete").write_bytes(b"1234")
    begun, partial = listed(cli)
    assert (begun["name"], begun["revision"], begun["bytes"], begun["complete"]) == ("acme/dbrx-begun", None, 4, False)
    assert partial["missing"] == ["model-00002-of-00003.safetensors"] and not partial["complete"]
    result = cli("models", "path", NAME)
    assert result.code == 3 and "not complete" in result.fault
    assert cli("models", "remove", "--yes", "acme/dbrx-begun").code == 0
    assert [row["name"] for row in listed(cli)] == [NAME]


def test_path(cli: Cli, add: Add) -> None:
    add(NAME, checkpoint())
    assert cli("models", "path", NAME).out == listed(cli)[0]["path"] + "\n"
    for name in ("acme/other", "demo", "/nowhere"):
        result = cli("models", "path", name)
        assert (result.code, result.out) == (3, "")


def test_remove_says_what_it_frees(cli: Cli, add: Add, cache: Path) -> None:
    add(NAME, checkpoint())
    other = add("acme/another-dbrx", checkpoint(seed=5))
    refused = cli("models", "remove", NAME)
    assert refused.code == 2 and "--yes" in refused.fault and len(listed(cli)) == 2
    result = cli("models", "remove", NAME, "--yes")
    assert result.code == 0 and result.fault == "dbrx: removed acme/tiny-dbrx, 301.3 kB freed"
    assert [row["revision"] for row in listed(cli)] == [other]
    assert not (cache / "models--acme--tiny-dbrx").exists()
    assert cli("models", "remove", NAME, "--yes").code == 3


def test_a_revision_goes_and_what_it_shares_stays(cli: Cli, add: Add, cache: Path) -> None:
    old = add(NAME, checkpoint(seed=1), ref="v1")
    files = checkpoint(seed=2) | {
        "model-00001-of-00003.safetensors": checkpoint(seed=1)["model-00001-of-00003.safetensors"]
    }
    new = add(NAME, files)
    assert {row["revision"] for row in listed(cli)} == {old, new}
    result = cli("models", "remove", NAME, "--revision", "v1", "--yes")
    assert result.code == 0 and old[:12] in result.fault and "kB freed" in result.fault
    (row,) = listed(cli)
    assert row["revision"] == new and row["complete"]
    for path, data in files.items():
        assert (Path(row["path"]) / path).read_bytes() == data
    assert not scan_cache_dir(cache).warnings
    assert len(list((cache / "models--acme--tiny-dbrx" / "blobs").iterdir())) == len(files)
    assert cli("models", "remove", NAME, "--revision", "v1", "--yes").code == 3


def test_links_that_lead_elsewhere_are_not_followed(cli: Cli, add: Add, cache: Path, tmp_path: Path) -> None:
    add(NAME, checkpoint())
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "keep").write_bytes(b"x" * 1000)
    storage = cache / "models--acme--tiny-dbrx"
    os.symlink(treasure, storage / "blobs" / "folder")
    os.symlink(treasure / "keep", next((storage / "snapshots").iterdir()) / "extra.safetensors")
    assert cli("models", "remove", NAME, "--yes").code == 0
    assert (treasure / "keep").exists() and not storage.exists()


def plant(storage: Path, snapshot: Path, mine: Path, where: str) -> None:
    """A link, at one of the places that removing passes, to a folder with a file of the user's."""
    blobs, other = storage / "blobs", storage.parent / "models--acme--other"
    if where in ("snapshots", "blobs", "refs", "trees", ".dbrx"):
        folder = storage / where
        if folder.exists():
            folder.rename(mine / where)
        (mine / where).mkdir(exist_ok=True)
        folder.symlink_to(mine / where)
    elif where == "the snapshot":
        snapshot.rename(mine / "snapshot")
        snapshot.symlink_to(mine / "snapshot")
    elif where == "the model":
        storage.rename(mine / "storage")
        storage.symlink_to(mine / "storage")
    elif where == "a ref":
        (storage / "refs" / "main").rename(mine / "main")
        (storage / "refs" / "main").symlink_to(mine / "main")
    elif where == "a blob":
        blob = (snapshot / "config.json").resolve()
        blob.rename(mine / "blob")
        blob.symlink_to(mine / "blob")
    elif where == "a folder in the snapshot":
        (snapshot / "folder").symlink_to(mine)
    elif where == "a folder of blobs":
        (blobs / "folder").mkdir()
        (blobs / "folder" / "mine").write_bytes(b"mine")
        (snapshot / "link").symlink_to("../../blobs/folder")
    elif where == "another model":
        (other / "blobs").mkdir(parents=True)
        (other / "blobs" / "theirs").write_bytes(b"theirs")
        (snapshot / "link").symlink_to("../../../models--acme--other/blobs/theirs")
    elif where == "a way up":
        (snapshot / "link").symlink_to(f"../../blobs/../../../{mine.name}/keep")
    elif where == "another snapshot":
        (snapshot / "link").symlink_to(f"../{'e' * 40}/real")
    elif where == "a hard link":
        os.link(mine / "keep", blobs / "hard")
        (snapshot / "link").symlink_to("../../blobs/hard")
    else:
        (snapshot / "link").symlink_to(mine / "keep")


PLACES = [
    "a file", "a way up", "a ref", "a blob", "a hard link", "a folder in the snapshot", "a folder of blobs",
    "another model", "another snapshot", "snapshots", "blobs", "refs", "trees", ".dbrx", "the snapshot", "the model",
]  # fmt: skip


def contents(*folders: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("revision", [True, False])
def test_what_a_planted_link_leads_to_stays(
    add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: bool
) -> None:
    for i, where in enumerate(PLACES):
        cache, mine = tmp_path / f"hub-{i}", tmp_path / f"mine-{i}"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        mine.mkdir()
        (mine / "keep").write_bytes(b"x" * 100_000)
        commit = add(NAME, checkpoint())
        storage = cache / "models--acme--tiny-dbrx"
        (storage / "snapshots" / ("e" * 40)).mkdir()
        (storage / "snapshots" / ("e" * 40) / "real").write_bytes(b"another revision")
        plant(storage, storage / "snapshots" / commit, mine, where)
        others = cache / "models--acme--other"
        before = contents(mine, others)
        models = [model for model in inventory.inventory() if model.commit == commit]
        try:
            paths = inventory.removal(models, all_revisions=not revision)
            freed = inventory.freed_bytes(paths)
            inventory.remove_paths(paths)
        except ModelError as fault:  # only where a folder of the cache is the link
            assert revision and "leads out of the cache" in fault.message
            assert where in ("snapshots", "blobs", "refs", "trees", ".dbrx", "the model")
        else:
            usual = sum(map(len, checkpoint().values()))
            assert freed < usual + 10_000
            assert not (storage / "snapshots" / commit).exists() or storage.is_symlink()
            assert not revision or (storage / "snapshots" / ("e" * 40) / "real").read_bytes() == b"another revision"
        assert contents(mine, others) == before, where


def test_a_revision_is_named_in_full(cli: Cli, add: Add, cache: Path) -> None:
    commit = add(NAME, checkpoint())
    for revision in ("", " ", "..", "/", commit[0], commit[:6], "mai", "v1", commit[:12] + "0"):
        with pytest.raises((InputError, ModelError)):
            _to_remove(NAME, revision)
    assert cli("models", "remove", NAME, "--revision", "", "--yes").code == 2
    assert cli("models", "remove", "demo", "--revision", "main", "--yes").code == 2
    assert cli("models", "remove", NAME, "--revision", commit[:7], "--yes").code == 0 and listed(cli) == []


def test_a_revision_without_a_config_keeps_its_blobs(cli: Cli, add: Add, cache: Path) -> None:
    """It is not listed, as nothing says that it is a DBRX checkpoint, and another program may have begun it."""
    shard = "model-00001-of-00003.safetensors"
    name = "acme/tiny-model"
    commit = add(name, checkpoint())
    begun = add(name, {shard: checkpoint()[shard]}, ref="begun")
    assert cli("models", "remove", name, "--revision", commit, "--yes").code == 0
    assert (cache / "models--acme--tiny-model" / "snapshots" / begun / shard).read_bytes() == checkpoint()[shard]


def test_a_damaged_cache_is_no_fault(cli: Cli, add: Add, cache: Path) -> None:
    add(NAME, checkpoint())
    storage = cache / "models--acme--tiny-dbrx"
    (storage / "refs" / "broken").write_bytes(b"\xff\xfe")
    (storage / "snapshots" / "a-file").write_text("")
    snapshot = next(path for path in (storage / "snapshots").iterdir() if path.is_dir())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/gone")
    (cache / "models--nobody--dbrx").mkdir()
    (row,) = listed(cli)
    assert row["missing"] == ["config.json"]


def test_a_folder_of_ones_own_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    result = cli("models", "remove", "--yes", tmp_path)
    assert result.code == 2 and "outside the cache" in result.fault and tmp_path.exists()


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_is_one_of_them(cli: Cli, tmp_path: Path, name: str) -> None:
    from dbrx_cli.demo import RECIPES, SHA256, WHEEL, demo_folder

    folder = demo_folder(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    source = {"wheel": WHEEL, "sha256": SHA256, "converter": RECIPES[name].version, "files": {"config.json": 2}}
    source["checksum"] = RECIPES[name].checksum
    (folder / "source.json").write_text(json.dumps(source))
    (row,) = listed(cli)
    assert row["name"] == name and row["complete"]
    assert cli("models", "path", name).out == f"{folder}\n"
    assert cli("models", "remove", name, "-y").code == 0 and not folder.exists()
    assert listed(cli) == []


def test_it_asks_on_a_terminal(add: Add) -> None:
    add(NAME, checkpoint())
    for answer, left in (("n", 1), ("y", 0)):
        terminal = spawn("models", "remove", NAME)
        terminal.expect(r"Remove acme/tiny-dbrx, 301.3 kB\? \[y/N\]")
        terminal.sendline(answer)
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert (terminal.exitstatus == 0) == (left == 0)
        assert len(inventory.inventory()) == left


@pytest.mark.parametrize("columns", [40, 100])
def test_the_table_of_a_terminal(add: Add, columns: int) -> None:
    add(NAME, checkpoint())
    terminal = spawn("models", columns=columns)
    terminal.expect(pexpect.EOF)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.before or "").splitlines()
    assert all(len(line) <= columns for line in lines)
    assert columns == 40 or any("acme/tiny-dbrx" in line and "300.3 kB" in line for line in lines)


def test_it_starts_without_torch() -> None:
    code = "from dbrx_cli.app import app\ntry: app(['models'])\nexcept SystemExit: pass"
    assert not {"torch", "accelerate", "rich", "tiktoken"} & loaded_by(code)
