"""Files at rest against their checksums."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .layout import digest, file_size, in_blobs, missing_files, names_in, tree_of
from .listing import ETAG
from .plain_folder import note
from .progress import Progress, Silent


@dataclass(frozen=True)
class Problem:
    """A file that is not what the Hub has under its name."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def verify_cached(folder: Path, progress: Progress | None = None) -> list[Problem]:
    """Compare each file of a downloaded checkpoint with the size and checksum that the Hub gave; no network.

    [] means that all is well. A file of which nothing was noted (put there by other means) is not judged, but
    what the checkpoint lacks is named.
    """
    progress = progress or Silent()
    names = names_in(folder)
    if folder.parent.name != "snapshots":
        names = [name for name in names if note(folder, name) is not None]
    listed = {file.path: file for file in tree_of(folder) or ()}
    sizes = {name: file_size(folder / name) or 0 for name in names}
    progress.start(sum(sizes.values()), 0, len(names))
    problems = [Problem(name, "missing") for name in missing_files(folder) if file_size(folder / name) is None]
    for name in names:
        progress.file(name, sizes[name], 0)
        etag = _expected(folder, name) or (listed[name].etag if name in listed else None)
        if name in listed and sizes[name] != listed[name].size:
            problems.append(Problem(name, f"{sizes[name]:,} bytes instead of {listed[name].size:,}"))
        elif etag is not None and digest(folder / name, etag, partial(progress.advance, name)) != etag:
            problems.append(Problem(name, "wrong checksum"))
    return sorted(problems, key=lambda problem: problem.name)


def remove(folder: Path, problem: Problem) -> None:
    """Take a damaged file away, with the blob behind it, so that the next download fetches it.

    What a link leads to elsewhere is no part of the checkpoint, and stays.
    """
    path = folder / problem.name
    blob = in_blobs(folder.parent.parent, path) if folder.parent.name == "snapshots" else None
    path.unlink(missing_ok=True)
    if blob is not None:
        blob.unlink(missing_ok=True)


def _expected(folder: Path, name: str) -> str | None:
    """The etag: the name of the blob in the cache, the note in a plain folder."""
    path = folder / name
    if folder.parent.name != "snapshots":
        noted = note(folder, name)
        return noted[0] if noted else None
    etag = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return etag if ETAG.fullmatch(etag) else None
