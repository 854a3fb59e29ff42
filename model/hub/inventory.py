"""Which DBRX checkpoints the Hub's cache holds, and how to be rid of one."""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..formats.locate import gguf_models, is_gguf_of_dbrx
from ..safetensors_file import read_json, read_text
from .layout import OURS, THEIRS, cache_folder, in_blobs, missing_files, obstacle

KIND = "dbrx"


@dataclass(frozen=True)
class CachedModel:
    """One revision of a checkpoint; `commit` is None where only parts of files have come so far."""

    name: str
    commit: str | None
    refs: tuple[str, ...]  # branches and tags that point to it
    folder: Path  # what a program loads from
    nbytes: int  # on disk, with what it shares with other revisions
    missing: tuple[str, ...]  # files, where the cache knows them
    last_used: float | None  # seconds since 1970, as far as the file system keeps it
    gguf: bool = False  # GGUF files, no safetensors

    @property
    def complete(self) -> bool:
        return self.commit is not None and not self.missing


def inventory() -> list[CachedModel]:
    """The DBRX checkpoints in the cache, by name; no network. A damaged entry is listed as incomplete."""
    found = (model for storage in sorted(cache_folder().glob("models--*--*")) for model in _models_in(storage))
    return sorted(found, key=lambda model: (model.name, not model.refs, model.commit or ""))


def removal(models: Iterable[CachedModel], *, all_revisions: bool) -> list[Path]:
    """Files and folders that go with these revisions of one checkpoint: what the others share stays.

    Everything lies in the cache, the ends of its links do not count. `ModelError` if a folder of it is a link itself.
    """
    gone = list(models)
    storage = _storage(gone[0].folder)
    commits = {model.commit for model in gone}
    kept = [folder for folder in _snapshots(storage) if folder.name not in commits]
    if all_revisions or not kept:
        return [storage]
    shared = {blob for folder in kept for blob in _own_blobs(folder)}
    blobs = sorted({blob for model in gone for blob in _own_blobs(model.folder)} - shared)
    refs = [storage / "refs" / ref for model in gone for ref in model.refs]
    trees = [storage / each / f"{model.commit}.json" for model in gone for each in (OURS, THEIRS)]
    paths = [*refs, *(model.folder for model in gone), *blobs, *trees]
    for path in paths:
        if (link := obstacle(cache_folder(), path)) is not None:
            raise ModelError(f"{link} leads out of the cache, nothing was removed", "remove by hand what is to go")
    return paths


def freed_bytes(paths: Iterable[Path]) -> int:
    """What the disk gets back: links do not count, nor do files that keep another name elsewhere (hard links)."""
    names: Counter[tuple[int, int]] = Counter()
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for path in paths:
        for file in path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]:
            status = _status(file, follow=False)
            if status is not None and stat.S_ISREG(status.st_mode):
                names[status.st_dev, status.st_ino] += 1
                sizes[status.st_dev, status.st_ino] = (status.st_size, status.st_nlink)
    return sum(size for file, (size, links) in sizes.items() if names[file] >= links)


def remove_paths(paths: Iterable[Path]) -> None:
    """Delete in the order given: names first, so that an interruption leaves waste and never a wrong model."""
    for path in paths:
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        except OSError as error:
            raise ModelError(f"{path} cannot be removed: {error.strerror}", "check who owns it") from None


def _models_in(storage: Path) -> Iterator[CachedModel]:
    name = storage.name.removeprefix("models--").replace("--", "/")
    refs = dict(_refs(storage / "refs"))
    snapshots = _snapshots(storage)
    for folder in snapshots:
        if _is_dbrx(folder, name):
            pointing = tuple(sorted(ref for ref, commit in refs.items() if commit == folder.name))
            sizes = [status for blob in _blobs(folder) if (status := _status(blob))]
            used = max((status.st_atime for status in sizes), default=None)
            nbytes = sum(status.st_size for status in sizes)
            missing, gguf = tuple(missing_files(folder)), bool(gguf_models(folder))
            yield CachedModel(name, folder.name, pointing, folder, nbytes, missing, used, gguf)
    parts = [status for path in (storage / "blobs").glob("*") if (status := _status(path))]
    if not snapshots and parts and KIND in name.lower():
        used = max(status.st_atime for status in parts)
        yield CachedModel(name, None, (), storage / "snapshots", sum(s.st_size for s in parts), (), used)


def _snapshots(storage: Path) -> list[Path]:
    return [path for path in sorted((storage / "snapshots").glob("*")) if path.is_dir()]


def _refs(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.rglob("*"):
        if path.is_file():
            try:
                yield path.relative_to(folder).as_posix(), read_text(path).strip()
            except ModelError:
                continue


def _is_dbrx(folder: Path, name: str) -> bool:
    """What config.json says, or the name where it has not come yet."""
    try:
        return bool(read_json(folder / "config.json").get("model_type") == KIND)
    except ModelError:
        return KIND in name.lower() or any(map(is_gguf_of_dbrx, gguf_models(folder)))


def _blobs(folder: Path) -> set[Path]:
    """The files behind a snapshot's links, links into a store that models share left as they are."""
    return {
        Path(os.path.abspath(path.parent / os.readlink(path))) if path.is_symlink() else path
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def _own_blobs(folder: Path) -> set[Path]:
    """Those of them that are the model's own."""
    storage = _storage(folder)
    return {blob for path in folder.rglob("*") if (blob := in_blobs(storage, path)) is not None}


def _status(path: Path, *, follow: bool = True) -> os.stat_result | None:
    try:
        return path.stat(follow_symlinks=follow)
    except OSError:
        return None


def _storage(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.name.startswith("models--"))
