"""A file on its way in: it outlives its process, and what other programs do to it costs time and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .layout import KEEPS_REMOVING, PIECE, Place, hasher, make_folder
from .listing import HubFile
from .retry import STALL_SECONDS, RetryPolicy

NAME = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})\.[^.]+-[^.]+\.incomplete")
ABANDONED_SECONDS = 14 * 24 * 3600.0  # a partial file that nothing was written to for so long is waste
MOST_RESCUES = 5


class Partial:
    """It only grows, and the checksum of what is in it is known at any time.

    Its name holds the etag, so only the same bytes continue it, and a random part: where locks do not hold, two
    writers have a file each. `alone` says that they do hold: then nobody writes what earlier attempts left, from
    whichever process, host or container. Else it is left alone for a while, as somebody may still write it.
    """

    def __init__(
        self, place: Place, file: HubFile, policy: RetryPolicy, notice: Callable[[str], None], *, alone: bool
    ) -> None:
        self.file = file
        self.size = 0
        self._place = place
        self._policy = policy
        self._notice = notice
        self._checksum: Any = hasher(file.etag, file.size)
        make_folder(place.scratch)
        self._path = self._name()
        self._fd = self._adopt(alone)
        try:
            self._read_back()
        except BaseException:
            self.close()
            raise

    def write(self, data: bytes) -> None:
        """Append; positioned writes, so that two writers of the same bytes could not mix them up."""
        if os.fstat(self._fd).st_nlink == 0:  # `hf cache prune` takes partial files away without asking
            self._rescue()
        view = memoryview(data)
        while view:
            n = os.pwrite(self._fd, view, self.size)
            self._checksum.update(view[:n])
            self.size += n
            view = view[n:]

    def restart(self) -> None:
        """Forget everything, in a new file: nobody who still has the old one open finds it cut."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
        self._path, self._fd = self._name(), -1
        self._fd = self._create()
        self.size = 0
        self._checksum = hasher(self.file.etag, self.file.size)

    def is_right(self) -> bool:
        """Whether what is there has the checksum that the listing gives."""
        return str(self._checksum.hexdigest()) == self.file.etag

    def finish(self) -> None:
        """Give the whole file its final name."""
        final = self._place.blob(self.file)
        for _ in range(MOST_RESCUES):
            os.fsync(self._fd)
            make_folder(final.parent)
            try:
                os.replace(self._path, final)
                return
            except FileNotFoundError:
                self._rescue()
        raise FileNotFoundError(None, KEEPS_REMOVING)

    def close(self) -> None:
        """What is on disk stays there for the next attempt."""
        if self._fd >= 0:
            empty = os.fstat(self._fd).st_size == 0
            os.close(self._fd)
            self._fd = -1
            if empty:
                self._path.unlink(missing_ok=True)

    def _name(self) -> Path:
        return self._place.scratch / f"{self.file.etag}.dbrx-{uuid.uuid4().hex[:8]}.incomplete"

    def _create(self) -> int:
        for _ in range(MOST_RESCUES):
            make_folder(self._place.scratch)
            with contextlib.suppress(FileNotFoundError):  # another program removed it again
                return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        raise FileNotFoundError(None, KEEPS_REMOVING)

    def _adopt(self, alone: bool) -> int:
        """Take over the largest partial file that nobody writes any more, or begin a new one."""
        for leftover in leftovers(self._place, self.file):
            try:
                if not alone and _age(leftover) < 2 * STALL_SECONDS:
                    continue
                os.rename(leftover, self._path)  # one wins, where two try
                fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            if _is_plain(os.fstat(fd)):
                os.utime(fd)
                return fd
            os.close(fd)
            self._path.unlink()
        return self._create()

    def _read_back(self) -> None:
        if os.fstat(self._fd).st_size > self.file.size:
            return self.restart()
        while piece := os.pread(self._fd, PIECE, self.size):
            self._checksum.update(piece)
            self.size += len(piece)
            self._policy.check_stop()
            self._policy.restart(self.size)
        return None

    def _rescue(self) -> None:
        """The file lost its name: what came so far is copied into a new one."""
        self._notice(f"{self.file.path}: another program removed its partial file, which is written again")
        lost, end = self._fd, self.size
        self._path = self._name()
        self._fd = self._create()
        try:
            done = 0
            while done < end:
                done += os.pwrite(self._fd, os.pread(lost, min(PIECE, end - done), done), done)
                self._policy.check_stop()
                self._policy.restart(self.size)
        finally:
            os.close(lost)


def leftovers(place: Place, file: HubFile) -> list[Path]:
    """Partial files of this blob, the largest first; links and what else is no plain file are not among them."""
    found: list[tuple[int, Path]] = []
    for path in place.scratch.glob(f"{file.etag}.*-*.incomplete"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if _is_plain(status):
                found.append((status.st_size, path))
    return [path for _, path in sorted(found, reverse=True)]


def resumable(place: Place, file: HubFile) -> int:
    """Bytes that an earlier attempt left."""
    return max((min(path.lstat().st_size, file.size) for path in leftovers(place, file)), default=0)


def sweep(place: Place, whole: Iterable[HubFile]) -> None:
    """Remove partial files of what is whole, whoever completed it, and those that were given up long ago.

    One that is still written after all loses nothing: see `Partial.write`.
    """
    etags = {file.etag for file in whole}
    for path in place.scratch.glob("*.incomplete"):
        match = NAME.fullmatch(path.name)
        with contextlib.suppress(OSError):
            done = match and (match[1] in etags or (place.scratch / match[1]).exists())
            if match and (done or _age(path) > ABANDONED_SECONDS):
                path.unlink()


def _age(path: Path) -> float:
    """Seconds since something was written."""
    return time.time() - path.lstat().st_mtime


def _is_plain(status: os.stat_result) -> bool:
    """Whether this is a file of one name, so that writing to it changes no other."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1
