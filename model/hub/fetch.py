"""One file from the Hub: ranged GETs into a partial file that outlives the process, checked before it gets its name."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConnectionFault, DbrxError, ModelError, ResourceError
from .client import Hub
from .layout import PIECE, HubFile, Place, file_size, hasher
from .patience import AGAIN, STALL_SECONDS, Patience, Transient

WHOLE_TRIES = 3  # how often a file whose checksum is wrong is fetched from the start
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
LOCK_POLL_SECONDS = 0.2
Report = Callable[[str, int], None]  # path, bytes on disk


def fetch(
    hub: Hub, file: HubFile, place: Place, patience: Patience, report: Report, notice: Callable[[str], None]
) -> None:
    """Bring one file into its place, whole and checked, or raise.

    Safe against other processes that want the same file: a lock makes them wait, and where a file system's locks do
    not hold, each still writes a file of its own.
    """
    try:
        with _locked(place.lock(file), patience, lambda: notice(f"{file.path}: another process fetches it, waiting")):
            if not place.has_blob(file):
                partial = Partial(place, file, patience)
                try:
                    _fill(partial, hub, hub.file_url(file.path, place.commit), patience, report)
                    partial.finish()
                finally:
                    partial.close()
            place.publish(file)
    except OSError as error:
        raise disk_fault(error, file, place) from None
    report(file.path, file.size)


def resumable(place: Place, file: HubFile) -> int:
    """Bytes that an earlier attempt left."""
    return max((min(file_size(path) or 0, file.size) for path in _leftovers(place, file)), default=0)


def disk_fault(error: OSError, file: HubFile, place: Place) -> DbrxError:
    """What went wrong while a file was written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"the disk is full: {file.path} needs {file.size - resumable(place, file):,} more bytes in {place.root}",
            "free some space and run the same command again: it continues where this one stopped",
        )
    return DbrxError(f"{place.root}: {file.path} cannot be written: {error.strerror or type(error).__name__}")


class Partial:
    """A file on its way in: it only grows, and the checksum of what is in it is known at any time.

    Its name holds the etag, so only the same bytes continue it, and the host and process that write it, so that
    nobody continues what another still writes.
    """

    def __init__(self, place: Place, file: HubFile, patience: Patience) -> None:
        self.file = file
        self._place = place
        self._path = place.scratch / f"{file.etag}.{_owner()}.incomplete"
        place.scratch.mkdir(parents=True, exist_ok=True)
        leftover = max(_leftovers(place, file), key=lambda path: file_size(path) or 0, default=None)
        if leftover is not None and leftover != self._path:
            with contextlib.suppress(FileNotFoundError):  # another process took it first
                os.rename(leftover, self._path)
                os.utime(self._path)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.size = 0
        self._checksum: Any = hasher(file.etag, file.size)
        try:
            self._read_back(patience)
        except BaseException:
            self.close()
            raise

    def write(self, data: bytes) -> None:
        """Append; positioned writes, so that two writers of the same bytes could not mix them up."""
        view = memoryview(data)
        while view:
            n = os.pwrite(self._fd, view, self.size)
            self._checksum.update(view[:n])
            self.size += n
            view = view[n:]

    def restart(self) -> None:
        """Forget everything."""
        os.ftruncate(self._fd, 0)
        self.size = 0
        self._checksum = hasher(self.file.etag, self.file.size)

    def is_right(self) -> bool:
        """Whether what is there has the checksum that the listing gives."""
        return str(self._checksum.hexdigest()) == self.file.etag

    def finish(self) -> None:
        """Give the whole file its final name, and remove what other attempts left of it."""
        os.fsync(self._fd)
        final = self._place.blob(self.file)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self._path, final)
        for leftover in _leftovers(self._place, self.file):
            leftover.unlink(missing_ok=True)

    def close(self) -> None:
        """What is on disk stays there for the next attempt."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_back(self, patience: Patience) -> None:
        if os.fstat(self._fd).st_size > self.file.size:
            return self.restart()
        while piece := os.pread(self._fd, PIECE, self.size):
            self._checksum.update(piece)
            self.size += len(piece)
            patience.check_stop()
            patience.restart(self.size)
        return None


def _fill(partial: Partial, hub: Hub, url: str, patience: Patience, report: Report) -> None:
    """Complete a partial file; a wrong checksum starts it again, a few times."""
    for _ in range(WHOLE_TRIES):
        while partial.size < partial.file.size:
            try:
                _receive(partial, hub, url, patience, report)
            except Transient as transient:
                if transient.restart:
                    partial.restart()
                patience.pause(transient)
        if partial.is_right():
            return
        partial.restart()
    raise ModelError(
        f"{partial.file.path} does not have the checksum that the Hub gives for it, {WHOLE_TRIES} times in a row",
        "try again later, or from another network: something between here and the Hub changes the bytes",
    )


def _receive(partial: Partial, hub: Hub, url: str, patience: Patience, report: Report) -> None:
    """One request for what is missing."""
    file = partial.file
    with hub.get(url, patience, partial.size) as response:
        _line_up(partial, response)
        report(file.path, partial.size)
        for chunk in response.iter_raw():
            patience.reached(partial.size + len(chunk))
            if partial.size + len(chunk) > file.size:
                raise _odd_answer(file, "more bytes than the Hub lists")
            partial.write(chunk)
            report(file.path, partial.size)
    if partial.size < file.size:
        raise Transient(ConnectionFault(f"the server ended {file.path} after {partial.size:,} bytes", AGAIN))


def _line_up(partial: Partial, response: Any) -> None:
    """Check that the answer begins where the partial file ends; a whole file (200) begins again."""
    if response.status_code == 200:
        if response.headers.get("content-length", str(partial.file.size)) != str(partial.file.size):
            raise Transient(ConnectionFault(f"the server sent something else for {partial.file.path}", AGAIN))
        if partial.size:
            partial.restart()
        return
    match = CONTENT_RANGE.match(response.headers.get("content-range", ""))
    if not match or int(match[1]) != partial.size or match[2] not in ("*", str(partial.file.size)):
        raise _odd_answer(partial.file, "another part of the file than was asked for")


def _odd_answer(file: HubFile, what: str) -> Transient:
    return Transient(ConnectionFault(f"the server sent {what} for {file.path}", AGAIN), restart=True)


@contextlib.contextmanager
def _locked(path: Path, patience: Patience, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock as all Hub clients do; while another process has it, wait for as long as it takes."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for attempt in itertools.count():
            try:
                stack.enter_context(WeakFileLock(path, timeout=LOCK_POLL_SECONDS))
                break
            except TimeoutError:
                if attempt == 0:
                    waiting()
                patience.check_stop()
                patience.restart()
        patience.restart()
        yield


def _owner() -> str:
    host = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:40] or "host"
    return f"{host}-{os.getpid()}"


def _leftovers(place: Place, file: HubFile) -> list[Path]:
    """Partial files of this blob that nobody writes any more."""
    paths = place.scratch.glob(f"{file.etag}.*-*.incomplete")
    return [path for path in paths if _is_abandoned(path)]


def _is_abandoned(path: Path) -> bool:
    """Whether the writer is gone: a process of this host that does not run, or nothing written for a stall's time."""
    owner = path.name.split(".")[1]
    host, _, pid = owner.rpartition("-")
    if owner == _owner():
        return True
    if host == _owner().rpartition("-")[0] and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
    try:
        return time.time() - path.stat().st_mtime > 2 * STALL_SECONDS
    except OSError:
        return False
