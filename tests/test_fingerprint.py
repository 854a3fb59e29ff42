"""What a saved cache knows of the weights: any change of a file is seen, also where size and time are made the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dbrx_cli.engine.fingerprint import _weights

SIZE = 300_000


def write_at(place: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")

    return change


def replaced(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(path.read_bytes()[:-1] + b"\1")
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(new, path)


def swapped(path: Path) -> None:
    other, aside = path.with_name("b.safetensors"), path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def linked(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"\1" * SIZE)
    shutil.copystat(path, other)
    path.unlink()
    path.symlink_to(other)


CHANGES = [write_at(place) for place in (0, 65_535, 65_536, SIZE // 2, SIZE - 1)] + [replaced, swapped, linked]


@pytest.mark.parametrize("stored", ["plain", "in the Hub's cache"])
def test_any_change_of_the_weights_counts(tmp_path: Path, stored: str) -> None:
    for i, change in enumerate(CHANGES):
        folder = tmp_path / str(i) / "snapshots" / "c"
        (tmp_path / str(i) / "blobs").mkdir(parents=True)
        folder.mkdir(parents=True)
        for name in ("a.safetensors", "b.safetensors"):
            path = folder / name
            if stored != "plain":
                path = tmp_path / str(i) / "blobs" / name[0]
                (folder / name).symlink_to(path)
            path.write_bytes(name.encode() + b"\0" * (SIZE - len(name)))
            os.utime(path, ns=(0, 10**18))
        before, times = _weights(folder), (folder / "a.safetensors").stat()
        assert _weights(folder) == before
        change(folder / "a.safetensors")
        os.utime(folder / "a.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
        status = (folder / "a.safetensors").stat()
        assert (status.st_size, status.st_mtime_ns) == (SIZE, 10**18)
        assert _weights(folder) != before, change


def test_samples_are_seen_where_the_system_keeps_no_time_of_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems: other weights are told apart, though not each byte."""

    class Status:
        st_size, st_mtime_ns, st_ctime_ns = SIZE, 1, 1

    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\0" * 100_000 + bytes(range(200)) * 1000)
    monkeypatch.setattr(Path, "stat", lambda self, **_: Status)
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    before = _weights(path)
    path.write_bytes(b"\0" * 100_000 + bytes(range(1, 201)) * 1000)
    assert _weights(path) != before
