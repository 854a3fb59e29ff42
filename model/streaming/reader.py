"""Reads experts from their files: a few threads, whole blocks past the page cache, straight into slots."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import ModelError
from ..safetensors_file import damaged, opened
from ..weights import Extent
from .slots import BLOCK, STAGING, Slot
from .source import Ticket, layout

PIECE = STAGING  # bytes a read: large enough for the disk's full speed, small enough to be interrupted
THREADS = 4
PATIENCE = 2.0  # seconds for a thread to end


class Piece(NamedTuple):
    """A read of one thread: `needed` bytes of a file from `start`, to offset `at` of the slot."""

    file: Path
    start: int
    at: int
    needed: int


class File:
    """An open file of the checkpoint, read past the page cache where the file system can."""

    def __init__(self, path: Path, folder: Path) -> None:
        with opened(path, folder) as (fd, _):
            self.plain = os.dup(fd)
            self.direct = _open_directly(fd)
        self.reads_directly = self.direct >= 0

    def read(self, slot: Slot, piece: Piece) -> int:
        """Bytes that were read, whole blocks if directly; at the file's end fewer than were needed."""
        done = 0
        if self.reads_directly and piece.start % BLOCK == 0:
            try:
                done = slot.read(self.direct, piece.start, piece.at, -(-piece.needed // BLOCK) * BLOCK)
            except OSError:  # a file system that takes the flag but not the reads, or a fault that comes again below
                self.reads_directly = False
        while done < piece.needed and (
            got := slot.read(self.plain, piece.start + done, piece.at + done, piece.needed - done)
        ):
            done += got
        return done

    def close(self) -> None:
        os.close(self.plain)
        if self.direct >= 0:
            os.close(self.direct)


class DiskSource:
    """Reads in the order of being asked, several pieces at once. Files stay open: one that is deleted is still read."""

    def __init__(self, folder: Path, threads: int = THREADS) -> None:
        self.bytes_read = 0
        self._folder = folder
        self._files: dict[Path, File] = {}
        self._pieces: deque[tuple[Ticket, Piece]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._alive = threads
        self._threads = [threading.Thread(target=self._work, name="expert reader", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def start(self, ticket: Ticket, extents: Sequence[Extent]) -> None:
        for extent in extents:
            if extent.file not in self._files:
                self._files[extent.file] = File(extent.file, self._folder)
        pieces = list(_pieces(extents))
        with self._changed:
            ticket.waiting = len(pieces)
            self._pieces += [(ticket, piece) for piece in pieces]
            self._changed.notify_all()

    def wait(self, ticket: Ticket) -> None:
        with self._changed:
            self._changed.wait_for(lambda: ticket.settled)
        if ticket.fault is not None:
            raise ticket.fault

    def cancel(self, ticket: Ticket) -> None:
        with self._changed:
            self._drop(ticket)
            self._changed.wait_for(lambda: ticket.running == 0)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._pieces.clear()
            self._changed.notify_all()
        if threading.current_thread() in self._threads:  # the garbage collector runs anywhere
            return
        # A thread that gives memory back while the interpreter ends would abort the process. A disk that hangs may.
        for thread in self._threads:
            thread.join(PATIENCE)

    def _work(self) -> None:
        """A thread's life: take the next piece, read it, tell."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self._closed)
                if self._closed:
                    self._alive -= 1
                    if not self._alive:  # the last one: nobody reads any more
                        self._close_files()
                    return
                ticket, piece = self._pieces.popleft()
                ticket.running += 1
            got, fault = self._read(ticket.slot, piece)
            with self._changed:
                self.bytes_read += got
                ticket.running -= 1
                ticket.waiting -= 1
                if fault is not None:
                    ticket.fault = fault
                    self._drop(ticket)
                if ticket.settled or not ticket.running:
                    self._changed.notify_all()
                del ticket, piece  # the slot's memory may go before the next piece comes

    def _read(self, slot: Slot, piece: Piece) -> tuple[int, Exception | None]:
        try:
            got = self._files[piece.file].read(slot, piece)
        except OSError as error:
            why = f"{piece.file}: cannot be read: {error.strerror}"
            return 0, ModelError(why, "check the disk or the connection to it, and try again")
        except Exception as error:  # told where it is waited for, or that would wait forever
            return 0, error
        short = got < piece.needed
        return got, damaged(piece.file, "became shorter while it was in use") if short else None

    def _drop(self, ticket: Ticket) -> None:
        self._pieces = deque(entry for entry in self._pieces if entry[0] is not ticket)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _pieces(extents: Sequence[Extent]) -> Iterator[Piece]:
    for extent, at in layout(extents)[0]:
        lead = at % BLOCK
        start, at, end = extent.start - lead, at - lead, extent.start + extent.nbytes
        while start < end:
            needed = min(PIECE, end - start)
            yield Piece(extent.file, start, at, needed)
            start, at = start + needed, at + needed


def _open_directly(fd: int) -> int:
    """The same file past the page cache; -1 where the file system has no such way."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):  # Linux has both
        return -1
