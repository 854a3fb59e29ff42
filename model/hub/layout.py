"""Where files lie: the cache that all Hub clients share. plain_folder.py is the other place that a download knows.

models--org--name/{blobs/<etag>, refs/<revision>, snapshots/<commit>/<path>}, locks in .locks/. An etag is a large
file's sha256, a small one's git id.

The listing of a commit is kept beside, in .dbrx/<commit>.json. It is not kept where huggingface_hub keeps its own
(trees/<commit>.json): that library takes a snapshot for incomplete, offline, when a file of that listing is not there,
and a checkpoint's code and pickles are never fetched. What the library kept there is read all the same.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError, ModelError
from ..formats.locate import gguf_models, missing_parts
from ..json_text import LISTING
from ..safetensors_file import read_json, read_text
from .listing import COMMIT, HubFile, check_together, is_safe

PIECE = 1 << 20
MOST_REMOVALS = 100
KEEPS_REMOVING = "another program keeps removing it"
OURS, THEIRS = ".dbrx", "trees"  # folders of kept listings: this program's, huggingface_hub's
NO_SYMLINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# What a checkpoint needs to be loaded, beyond the shards that its index names.
ESSENTIAL = ("config.json", "*.safetensors.index.json", "tokenizer*.json", "*.tiktoken", "*.jinja")


class Place(Protocol):
    """Where one commit's files go."""

    root: Path  # the folder that a program loads from
    commit: str
    scratch: Path  # for files on their way in; on the same file system as the final names
    tree_path: Path  # where the listing is kept

    def kept(self) -> list[HubFile] | None:
        """The commit's listing as it was kept here, by this program or another."""

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

    def refuse(self, file: HubFile) -> None:
        """`InputError` if the file would take the place of something that no download put there."""


class CacheSnapshot:
    """A snapshot in the shared cache: symbolic links to blobs."""

    def __init__(self, name: str, commit: str) -> None:
        cache = cache_folder()
        self.commit = commit
        self.storage = cache / f"models--{name.replace('/', '--')}"
        self.root = self.storage / "snapshots" / commit
        self.scratch = self.storage / "blobs"
        self.tree_path = self.storage / OURS / f"{commit}.json"
        self._locks = cache / ".locks" / self.storage.name

    def kept(self) -> list[HubFile] | None:
        return tree_of(self.root)

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
        make_folder(pointer.parent)
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))  # at once: no name that a kill could leave behind
        except FileExistsError:  # another process was quicker
            pass
        except FileNotFoundError:  # another one removed the folder, as the next round will find
            pass
        except OSError as error:
            if error.errno not in NO_SYMLINKS:
                raise
            os.replace(blob, pointer)  # as other clients do on such a file system

    def refuse(self, file: HubFile) -> None:
        """Nothing in the cache is the user's own, but a folder of it may be a link that leads to what is."""
        for path in (self.root / file.path, self.blob(file), self.tree_path, self.storage / "refs" / "name"):
            if (part := obstacle(self.storage, path)) is not None:
                raise InputError(f"{part} is not a folder, or is a link out of the cache", "remove it")


def in_blobs(storage: Path, path: Path) -> Path | None:
    """The blob that a snapshot's link names, if it is the model's own; what a link leads to elsewhere is another's."""
    if not path.is_symlink() or obstacle(storage, path) is not None:
        return None
    blob = Path(os.path.abspath(path.parent / os.readlink(path)))
    is_own = blob.parent == Path(os.path.abspath(storage / "blobs")) and obstacle(storage, blob) is None
    return blob if is_own and (blob.is_symlink() or blob.is_file()) else None


def cache_folder() -> Path:
    """HF_HUB_CACHE, or `hub` in HF_HOME."""
    from huggingface_hub import constants

    return Path(os.path.expanduser(constants.HF_HUB_CACHE))


def cached_commit(name: str, revision: str) -> str | None:
    """The commit that a revision pointed to when it was last downloaded."""
    if COMMIT.fullmatch(revision):
        return revision
    ref = cache_folder() / f"models--{name.replace('/', '--')}" / "refs" / revision
    try:
        commit = read_text(ref).strip()
    except ModelError:
        return None
    return commit if COMMIT.fullmatch(commit) else None


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
    """A kept listing, or None if there is none that can be read and makes sense."""
    try:
        content = read_json(path, LISTING)
        if content["format_version"] != 1:
            return None
        files = [
            HubFile.checked(
                name, entry.get("lfs_size", entry["size"]), entry["blob_id"], entry.get("lfs_sha256"),
                entry.get("xet_hash"),
            )
            for name, entry in content["files"].items()
        ]  # fmt: skip
        check_together(files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ModelError):
        return None
    return files


def tree_of(folder: Path) -> list[HubFile] | None:
    """The kept listing of a snapshot, or of a plain folder that was downloaded: of its newest commit."""
    if folder.parent.name == "snapshots":
        storage = folder.parent.parent
        kept = [storage / each / f"{folder.name}.json" for each in (OURS, THEIRS)]
    else:
        notes = folder / ".cache" / "huggingface"
        kept = [path for each in (OURS, THEIRS) for path in (notes / each).glob("*.json")]
        kept.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return next((files for path in kept if (files := read_tree(path)) is not None), None)


def missing_files(folder: Path, patterns: Sequence[str] | None = None) -> list[str]:
    """What a checkpoint in `folder` lacks, without network: [] means complete.

    The shards that its index names, what the kept listing of the commit says, and the sizes given there. With
    `patterns`, the listed files that match. A file gets its name only when it is whole, so existence is enough.
    Of a repository of GGUF files those that are here count, as llama.cpp fetches them, and other parts of the same.
    """
    tree = tree_of(folder)
    sizes = {file.path: file.size for file in tree or ()}
    if not matching(sizes, ["*.safetensors"]) and (models := gguf_models(folder)):
        return sorted(path.relative_to(folder).as_posix() for path in missing_parts(models))
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
            names = set(read_json(indexes[0])["weight_map"].values())
            return {name for name in names if isinstance(name, str) and is_safe(name)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ModelError):
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


def file_size(path: Path) -> int | None:
    """Bytes of a regular file, through links; None if there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):
        return None


def obstacle(folder: Path, path: Path) -> Path | None:
    """The first part of the way from a folder to a path in it that leads elsewhere (a link), or nowhere (a file)."""
    for part in list(reversed(path.relative_to(folder).parents))[1:]:
        step = folder / part
        if step.is_symlink() or (step.exists() and not step.is_dir()):
            return step
    return None


def hasher(etag: str, size: int) -> Any:
    """The running checksum that ends in `etag`: sha256 of the bytes, or git's blob id (sha1 over a header and them)."""
    if len(etag) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def digest(path: Path, etag: str, watch: Callable[[int], None] = lambda n: None) -> str | None:
    """The checksum of a file, of the kind that `etag` is, None if it cannot be read; `watch` hears of bytes."""
    try:
        with path.open("rb") as stream:
            checksum = hasher(etag, os.fstat(stream.fileno()).st_size)
            while piece := stream.read(PIECE):
                checksum.update(piece)
                watch(len(piece))
    except OSError:
        return None
    return str(checksum.hexdigest())


def make_folder(path: Path) -> None:
    """Make a folder and those above it. One that another program removes meanwhile is "File exists" for `mkdir`."""
    for _ in range(MOST_REMOVALS):
        try:
            path.mkdir(parents=True, exist_ok=True)
            return
        except FileNotFoundError:  # one above it
            continue
        except FileExistsError:
            if os.path.lexists(path) and not path.is_dir():
                raise
    raise FileNotFoundError(None, KEEPS_REMOVING)


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new one, never a part."""
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
