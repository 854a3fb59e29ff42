"""Plain files in a folder of the user's (`--to`), with what is known about them in .cache/huggingface/.

The notes there (download/<path>.metadata) are those of huggingface_hub, so each knows what the other downloaded. What
nobody downloaded, or somebody changed since, is the user's own.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from ..errors import InputError, ModelError
from ..safetensors_file import read_text
from .layout import OURS, THEIRS, digest, file_size, obstacle, read_tree, write_atomically
from .listing import ETAG, HubFile

CHANGED = "it was changed since it was downloaded"
DAMAGED = "it has the right size and another checksum"


class PlainFolder:
    """Plain files in a folder of the user's; what is known about them in .cache/huggingface/, as other clients do."""

    def __init__(self, folder: Path, commit: str) -> None:
        self.root = folder
        self.commit = commit
        self.scratch = folder / ".cache" / "huggingface" / "download"
        self.tree_path = folder / ".cache" / "huggingface" / OURS / f"{commit}.json"
        self._seen: dict[str, tuple[int, ...] | None] = {}  # what lay in the way of a file, and may be replaced

    def kept(self) -> list[HubFile] | None:
        theirs = self.tree_path.parent.with_name(THEIRS) / self.tree_path.name
        return read_tree(self.tree_path) or read_tree(theirs)

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
        if noted_etag(self.root, file.path) != file.etag:
            text = f"{self.commit}\n{file.etag}\n{time.time()}\n"
            write_atomically(self.scratch / f"{file.path}.metadata", text)

    def refuse(self, file: HubFile) -> None:
        state = _state(self.blob(file))
        if file.path in self._seen and self._seen[file.path] == state:
            return
        reason = self.in_the_way(file)
        if reason is not None:
            hint = "move it away, or name another folder with --to"
            if reason is CHANGED:
                hint += "; --verify sets it aside and fetches the file anew"
            raise InputError(f"{file.path} is not put into {self.root}: {reason}", hint)
        self._seen[file.path] = state

    def in_the_way(self, file: HubFile) -> str | None:
        """Why a file must not take its place: something lies there that is not as a download left it."""
        path = self.blob(file)
        if os.path.lexists(self.root) and not self.root.is_dir():
            return f"{self.root} is not a folder"
        for way in (path, self.lock(file), self.tree_path):
            if (part := obstacle(self.root, way)) is not None:
                return f"{part} is not a folder, or is a link"
        if not os.path.lexists(path) or self.holds(file):
            return None
        if path.is_symlink() or not path.is_file():
            return f"{path} is a link, or not a file"
        noted = note(self.root, file.path)
        if noted is None:
            return DAMAGED if file_size(path) == file.size else "a file of this name is there that was not downloaded"
        return None if digest(path, noted[0]) == noted[0] else CHANGED

    def set_aside(self, file: HubFile) -> Path:
        """Give a file that was changed another name, and return that."""
        path = self.blob(file)
        names = (path.with_name(f"{path.name}.changed-{i}") for i in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        os.rename(path, aside)
        return aside


def note(folder: Path, path: str) -> tuple[str, float] | None:
    """What a plain folder's notes say of a file: its etag, and until when (seconds since 1970) nobody changed it."""
    try:
        lines = read_text(folder / ".cache" / "huggingface" / "download" / f"{path}.metadata").splitlines()
        return (lines[1], float(lines[2])) if ETAG.fullmatch(lines[1]) else None
    except (ModelError, ValueError, IndexError):
        return None


def noted_etag(folder: Path, path: str) -> str | None:
    """The etag in the notes, if the file's time says that nobody changed it since."""
    noted = note(folder, path)
    try:
        # One second of tolerance: some file systems keep no finer times.
        return noted[0] if noted and (folder / path).stat().st_mtime - 1 <= noted[1] else None
    except OSError:
        return None


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes when somebody writes a file, or another in its place."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
