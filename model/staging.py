"""Memory through which experts go up to a card: while one is copied, the next is read from its file.

A card copies pinned memory by itself, so a copy is only begun here; an event says when all that was begun is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol

import torch

from .errors import ResourceError
from .streaming.slots import CpuSlot
from .streaming.source import slot_size
from .weights import Extent


class Event(Protocol):
    """As CUDA has it."""

    def synchronize(self) -> None:
        """Return when all is done that was begun before it was recorded."""


class Staging:
    """A few buffers, in turn: each is filled again when the card has copied what was there before.

    No more experts are on their way than there are buffers, so no more of them lie on the card as floats.
    """

    def __init__(self, buffers: Sequence[CpuSlot], record: Callable[[torch.device], Event]) -> None:
        """record: an event behind all that was begun on a card."""
        self._record = record
        self._count = len(buffers)
        self._free: SimpleQueue[tuple[CpuSlot, Event | None]] = SimpleQueue()
        for buffer in buffers:
            self._free.put((buffer, None))

    @contextmanager
    def buffer(self, device: torch.device) -> Iterator[CpuSlot]:
        """A buffer to fill, and to begin copies from to a card; waits until one is free."""
        buffer, copied = self._free.get()
        try:
            if copied is not None:
                copied.synchronize()
            yield buffer
            copied = self._record(device)
        finally:
            self._free.put((buffer, copied))

    def close(self) -> None:
        """Wait for the card, and give the memory back."""
        for buffer, copied in [self._free.get() for _ in range(self._count)]:
            if copied is not None:
                copied.synchronize()
            buffer.unpin()


@contextmanager
def staged(count: int, experts: Iterable[Sequence[Extent]], device: torch.device) -> Iterator[Staging | None]:
    """So many buffers beside a card, each for any of the experts; none beside a CPU, which keeps what is read."""
    if device.type != "cuda":
        yield None
        return
    nbytes = slot_size(experts)
    staging = Staging([_pinned(nbytes) for _ in range(count)], lambda of: torch.cuda.current_stream(of).record_event())
    try:
        yield staging
    finally:
        staging.close()


def _pinned(nbytes: int) -> CpuSlot:
    """Where a limit forbids it not pinned: the driver then copies to memory of its own first, and nothing overlaps."""
    try:
        return CpuSlot(nbytes, pinned=True)
    except ResourceError:
        return CpuSlot(nbytes)
