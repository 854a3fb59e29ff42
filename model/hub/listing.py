"""What the Hub says that a commit holds: checked as a whole before anything is done with it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..errors import ModelError

COMMIT = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
LARGEST = 1 << 50  # bytes of a file


class ListingFault(ModelError):
    """A listing that could lead out of the folder, or makes no sense."""


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
        """An entry of the Hub's tree listing; `ListingFault` if it could lead out of the folder or makes no sense."""
        lfs = entry.get("lfs") or {}
        if not isinstance(lfs, dict):
            raise ListingFault(f'the listing of {entry.get("path")!r:.80} has no valid "lfs"')
        return cls.checked(
            entry.get("path"), lfs.get("size", entry.get("size")), entry.get("oid"), lfs.get("oid"),
            entry.get("xetHash"),
        )  # fmt: skip

    @classmethod
    def checked(cls, path: Any, size: Any, blob_id: Any, sha256: Any, xet_hash: Any = None) -> HubFile:
        """Values that came from elsewhere."""
        if not isinstance(path, str) or not is_safe(path):
            raise ListingFault(f"the listing holds an unsafe file name: {path!r:.80}", "do not use this repository")
        etag = sha256 or blob_id
        if type(size) is not int or not 0 <= size <= LARGEST or not isinstance(etag, str) or not ETAG.fullmatch(etag):
            raise ListingFault(f"the listing of {path!r:.80} has no valid size or checksum")
        return cls(path, size, str(blob_id), sha256 or None, xet_hash if isinstance(xet_hash, str) else None)


def check_together(files: Iterable[HubFile]) -> None:
    """`ListingFault` where two entries cannot both be: a name twice, or a file that is also a folder."""
    names: set[str] = set()
    for file in files:
        if file.path in names:
            raise ListingFault(f"the listing holds {file.path!r:.80} twice")
        names.add(file.path)
    for name in names:
        for folder in PurePosixPath(name).parents:
            if str(folder) in names:
                raise ListingFault(f"the listing holds {str(folder)!r:.80} as a file and as a folder")


def is_safe(path: str) -> bool:
    """Whether a relative path stays inside its folder and out of the bookkeeping."""
    parts = path.split("/")
    plain = not any(part in ("", ".", "..") for part in parts) and parts[0] != ".cache"
    return plain and not PurePosixPath(path).is_absolute() and "\\" not in path and path.isprintable()
