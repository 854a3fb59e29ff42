"""Where files lie: the cache that all Hub clients share, or a plain folder with the Hub's bookkeeping beside.

models--org--name/{blobs/<etag>, refs/<revision>, snapshots/<commit>/<path>, trees/<commit>.json}, locks in .locks/.
A plain folder keeps the same facts in .cache/huggingface/. An etag is a large file's sha256, a small one's git id.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ..errors import ModelError

ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
PIECE = 1 << 20
NO_SYMLINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# What a checkpoint needs to be loaded, beyond the shards that its index names.
ESSENTIAL = ("config.json", "*.safetensors.index.json", "tokenizer*.json", "*.tiktoken", "*.jinja")


@dataclass(frozen=True)
class HubFile:
    """One file of a commit. `done` bytes of it are on disk; `present` says that it is whole."""

    path: str
    size: int
    blob_id: str
    sha256: str | None = None  # of large (LFS) files
    xet_hash: str | None = None
    present: bool = False
    done: int = 0

    @property
    def etag(self) -> str:
        """The name of its blob."""
        return self.sha256 or self.blob_id

    @classmethod
    def from_listing(cls, entry: dict[str, Any]) -> HubFile:
        """An entry of the Hub's tree listing; `ModelError` if it could lead out of the folder or makes no sense."""
        lfs = entry.get("lfs") or {}
        return cls.checked(
            entry.get("path"), lfs.get("size", entry.get("size")), entry.get("oid"), lfs.get("oid"),
            entry.get("xetHash"),
        )  # fmt: skip

    @classmethod
    def checked(cls, path: Any, size: Any, blob_id: Any, sha256: Any, xet_hash: Any = None) -> HubFile:
        """Values that came from elsewhere."""
        if not isinstance(path, str) or not is_safe(path):
            raise ModelError(f"the listing holds an unsafe file name: {path!r}", "do not use this repository")
        etag = sha256 or blob_id
        if not isinstance(size, int) or size < 0 or not isinstance(etag, str) or not ETAG.fullmatch(etag):
            raise ModelError(f"the listing of {path!r} has no valid size or checksum")
        return cls(path, size, str(blob_id), sha256 or None, xet_hash if isinstance(xet_hash, str) else None)


class Place(Protocol):
    """Where one commit's files go."""

    root: Path  # the folder that a program loads from
    commit: str
    scratch: Path  # for files on their way in; on the same file system as the final names
    tree_path: Path

    def blob(self, file: HubFile) -> Path:
        """The final name of a file's bytes."""

    def lock(self, file: HubFile) -> Path:
        """The lock that Hub clients hold while they write this blob."""

    def holds(self, file: HubFile) -> bool:
        """Whether the file is whole and in its place."""

    def has_blob(self, file: HubFile) -> bool:
        """Whether the bytes are there under their final name."""

    def publish(self, file: HubFile) -> None:
        """Put a whole blob in its place."""


class CacheSnapshot:
    """A snapshot in the shared cache: symbolic links to blobs."""

    def __init__(self, name: str, commit: str) -> None:
        cache = cache_folder()
        self.commit = commit
        self.storage = cache / f"models--{name.replace('/', '--')}"
        self.root = self.storage / "snapshots" / commit
        self.scratch = self.storage / "blobs"
        self.tree_path = self.storage / "trees" / f"{commit}.json"
        self._locks = cache / ".locks" / self.storage.name

    def blob(self, file: HubFile) -> Path:
        return self.scratch / file.etag

    def lock(self, file: HubFile) -> Path:
        return self._locks / f"{file.etag}.lock"

    def holds(self, file: HubFile) -> bool:
        return file_size(self.root / file.path) == file.size

    def has_blob(self, file: HubFile) -> bool:
        return file_size(self.blob(file)) == file.size

    def publish(self, file: HubFile) -> None:
        pointer, blob = self.root / file.path, self.blob(file)
        if self.holds(file):
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))  # at once: no name that a kill could leave behind
        except FileExistsError:  # another process was quicker
            pass
        except OSError as error:
            if error.errno not in NO_SYMLINKS:
                raise
            os.replace(blob, pointer)  # as other clients do on such a file system


class PlainFolder:
    """Plain files in a folder of the user's; what is known about them in .cache/huggingface/, as other clients do."""

    def __init__(self, folder: Path, commit: str) -> None:
        self.root = folder
        self.commit = commit
        self.scratch = folder / ".cache" / "huggingface" / "download"
        self.tree_path = folder / ".cache" / "huggingface" / "trees" / f"{commit}.json"

    def blob(self, file: HubFile) -> Path:
        return self.root / file.path

    def lock(self, file: HubFile) -> Path:
        return self.scratch / f"{file.path}.lock"

    def holds(self, file: HubFile) -> bool:
        """Size and noted etag, or the checksum where nothing is noted: another commit's shard has the same size."""
        path = self.blob(file)
        if file_size(path) != file.size:
            return False
        return noted_etag(self.root, file.path) == file.etag or digest(path, file.etag) == file.etag

    has_blob = holds

    def publish(self, file: HubFile) -> None:
        note = self.scratch / f"{file.path}.metadata"
        write_atomically(note, f"{self.commit}\n{file.etag}\n{time.time()}\n")


def cache_folder() -> Path:
    """HF_HUB_CACHE, or `hub` in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def cached_commit(name: str, revision: str) -> str | None:
    """The commit that a revision pointed to when it was last downloaded."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    ref = cache_folder() / f"models--{name.replace('/', '--')}" / "refs" / revision
    try:
        return ref.read_text("utf-8").strip()
    except (OSError, ValueError):
        return None


def write_ref(storage: Path, revision: str, commit: str) -> None:
    """Let a branch or tag point to a commit."""
    if revision != commit:
        write_atomically(storage / "refs" / revision, commit)


def write_tree(path: Path, files: Iterable[HubFile]) -> None:
    """Keep a commit's listing, in the form that huggingface_hub keeps (format 1)."""
    entries: dict[str, dict[str, Any]] = {}
    for file in files:
        entry: dict[str, Any] = {"size": file.size, "blob_id": file.blob_id}
        if file.sha256 is not None:
            entry |= {"lfs_sha256": file.sha256, "lfs_size": file.size}
        if file.xet_hash is not None:
            entry["xet_hash"] = file.xet_hash
        entries[file.path] = entry
    write_atomically(path, json.dumps({"format_version": 1, "files": entries}, indent=1))


def read_tree(path: Path) -> list[HubFile] | None:
    """A kept listing, or None if there is none that can be read."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format_version"] != 1:
            return None
        return [
            HubFile.checked(
                name, entry.get("lfs_size", entry["size"]), entry["blob_id"], entry.get("lfs_sha256"),
                entry.get("xet_hash"),
            )
            for name, entry in content["files"].items()
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ModelError):
        return None


def tree_of(folder: Path) -> list[HubFile] | None:
    """The kept listing of a snapshot or of a plain folder that was downloaded."""
    if folder.parent.name == "snapshots":
        return read_tree(folder.parent.parent / "trees" / f"{folder.name}.json")
    kept = list((folder / ".cache" / "huggingface" / "trees").glob("*.json"))
    return read_tree(max(kept, key=lambda path: path.stat().st_mtime)) if kept else None


def missing_files(folder: Path, patterns: Sequence[str] | None = None) -> list[str]:
    """What a checkpoint in `folder` lacks, without network: [] means complete.

    The shards that its index names, what the kept listing of the commit says, and the sizes given there. With
    `patterns`, the listed files that match. A file gets its name only when it is whole, so existence is enough.
    """
    tree = tree_of(folder)
    sizes = {file.path: file.size for file in tree or ()}
    if patterns is not None:
        wanted = set(matching(sizes, patterns)) if tree is not None else set()
        if tree is None and not any(matching(names_in(folder), patterns)):
            wanted = set(patterns)
    else:
        wanted = {"config.json"} | _weights(folder, sizes) | set(matching(_at_top(sizes), ESSENTIAL))
    return sorted(
        name for name in wanted if (size := file_size(folder / name)) is None or (name in sizes and size != sizes[name])
    )


def _weights(folder: Path, listed: Iterable[str]) -> set[str]:
    """Names of the weight files: those of the index, else those of the listing, else what is there."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            names = set(json.loads(indexes[0].read_text("utf-8"))["weight_map"].values())
            return {name for name in names if isinstance(name, str) and is_safe(name)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {f"{indexes[0].name} (cannot be read)"}
    names = set(matching(_at_top(listed), ["*.safetensors"]))
    if not names and not any(file_size(path) is not None for path in folder.glob("*.safetensors")):
        names = {"model.safetensors"}
    return names


def _at_top(names: Iterable[str]) -> list[str]:
    return [name for name in names if "/" not in name]


def names_in(folder: Path) -> list[str]:
    """Paths of the files in a folder, without the Hub's bookkeeping; broken links are left out."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.parts[0] != ".cache")


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Names that fit a pattern; `*` also stands for slashes, as everywhere on the Hub."""
    patterns = list(patterns)
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def is_safe(path: str) -> bool:
    """Whether a relative path stays inside its folder and out of the bookkeeping."""
    parts = path.split("/")
    plain = not any(part in ("", ".", "..") for part in parts) and parts[0] != ".cache"
    return plain and not PurePosixPath(path).is_absolute() and "\\" not in path and path.isprintable()


def file_size(path: Path) -> int | None:
    """Bytes of a regular file, through links; None if there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):
        return None


def noted_etag(folder: Path, path: str) -> str | None:
    """What a plain folder's notes say of a file that was not changed since."""
    try:
        lines = (folder / ".cache" / "huggingface" / "download" / f"{path}.metadata").read_text("utf-8").splitlines()
        # One second of tolerance: some file systems keep no finer times.
        return lines[1] if (folder / path).stat().st_mtime - 1 <= float(lines[2]) else None
    except (OSError, ValueError, IndexError):
        return None


def hasher(etag: str, size: int) -> Any:
    """The running checksum that ends in `etag`: sha256 of the bytes, or git's blob id (sha1 over a header and them)."""
    if len(etag) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def digest(path: Path, etag: str) -> str:
    """The checksum of a file, of the kind that `etag` is."""
    with path.open("rb") as stream:
        checksum = hasher(etag, os.fstat(stream.fileno()).st_size)
        while piece := stream.read(PIECE):
            checksum.update(piece)
    return str(checksum.hexdigest())


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
