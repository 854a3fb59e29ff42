"""Where experts come from: what a disk and the CPU's memory have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..weights import Extent
from .slots import BLOCK, Slot

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGNMENT = 8  # of numbers in memory; files of old writers keep none


@dataclass(eq=False)
class Ticket:
    """An expert on its way to a slot."""

    slot: Slot
    waiting: int = 0  # pieces that are not there yet
    running: int = 0  # of these, in a thread's hands
    fault: Exception | None = None
    copied: torch.cuda.Event | None = None  # where a GPU copies by itself

    @property
    def settled(self) -> bool:
        return self.waiting == 0 or self.fault is not None


class Source(Protocol):
    """Brings experts into slots, in the order of being asked, while others compute."""

    bytes_read: int

    def start(self, ticket: Ticket, extents: Sequence[Extent]) -> None:
        """Begin to fill the ticket's slot."""

    def wait(self, ticket: Ticket) -> None:
        """Return when the slot is filled; `ModelError` if it cannot be."""

    def cancel(self, ticket: Ticket) -> None:
        """Return when nothing is written to the slot any more, filled or not, started or not."""

    def close(self) -> None:
        """Let go of files and threads."""


class Placed(NamedTuple):
    """An extent, and the offset in a slot at which it comes to lie."""

    extent: Extent
    at: int


def layout(extents: Sequence[Extent]) -> tuple[list[Placed], int]:
    """Places in a slot for an expert's extents, and the bytes of the slot.

    Each begins in a block of its own at the same offset as in the file's block, so that whole blocks can be read
    straight to it. Numbers that the file does not align are aligned here, and can be read only without whole blocks.
    """
    placed, position = [], 0
    for extent in extents:
        lead = extent.start % BLOCK if extent.start % ALIGNMENT == 0 else 0
        placed.append(Placed(extent, position + lead))
        position = -(-(position + lead + extent.nbytes) // BLOCK) * BLOCK
    return placed, position


def slot_size(experts: Iterable[Sequence[Extent]]) -> int:
    """Bytes of a slot that any of the experts fits in."""
    return max(layout(extents)[1] for extents in experts)


def data_in(slot: Slot, extents: Sequence[Extent]) -> tuple[Tensor, ...]:
    """The bytes of each extent, uint8, as they lie in a filled slot."""
    return tuple(slot.tensor[at : at + extent.nbytes] for extent, at in layout(extents)[0])
