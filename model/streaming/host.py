"""Experts that lie in the CPU's memory and go to a GPU when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..weights import Extent
from .reader import DiskSource
from .slots import CpuSlot, GpuSlot
from .source import Ticket, layout


class HostSource:
    """Holds the bytes of all experts, pinned if there is a GPU; read from their files once, when it is made."""

    def __init__(self, folder: Path, experts: Iterable[tuple[Extent, ...]], device: torch.device) -> None:
        self._held: dict[tuple[Extent, ...], CpuSlot] = {}
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        disk = DiskSource(folder)
        try:
            tickets = []
            for extents in experts:
                held = CpuSlot(layout(extents)[1], pinned=self._stream is not None)
                self._held[extents] = held
                tickets.append(Ticket(held))
                disk.start(tickets[-1], extents)
            for ticket in tickets:
                disk.wait(ticket)
        finally:
            disk.close()
        self.bytes_read = disk.bytes_read

    def start(self, ticket: Ticket, extents: Sequence[Extent]) -> None:
        held = self._held[tuple(extents)].tensor
        if isinstance(ticket.slot, GpuSlot) and self._stream is not None:
            ticket.slot.copy(held, 0, self._stream)
            ticket.copied = self._stream.record_event()
        else:
            ticket.slot.tensor[: len(held)] = held

    def wait(self, ticket: Ticket) -> None:
        if ticket.copied is not None:
            torch.cuda.current_stream(ticket.slot.tensor.device).wait_event(ticket.copied)

    def cancel(self, ticket: Ticket) -> None:
        """Nothing to do: a later copy to the same slot goes behind this one on the same stream."""

    def close(self) -> None:
        self._held.clear()
