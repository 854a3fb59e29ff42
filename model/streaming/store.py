"""A cache of experts with a fixed number of places, filled in the background."""

from __future__ import annotations

import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..weights import Extent
from .counters import Counters
from .slots import Slot
from .source import Source, Ticket, data_in

if TYPE_CHECKING:
    from torch import Tensor

    from ..kernels import Packed

# Layer, expert and the bytes of its extents -> what the kernel computes with.
Pack = Callable[[int, int, "tuple[Tensor, ...]"], "Packed"]


@dataclass(eq=False)
class _Entry:
    """An expert that is here or on its way."""

    layer: int
    expert: int
    ticket: Ticket
    filled: bool = False
    packed: Packed | None = None

    @property
    def slot(self) -> Slot | None:
        """None when the expert is packed: its bytes are not needed any more."""
        return self.ticket.slot if self.packed is None else None


class ExpertStore:
    """The experts of all layers, of which `capacity` are held.

    With `in_place` an expert stays in its slot as it was read, and `pack` makes views of it at each use. Otherwise it
    is packed once, and its slot is free for the next one to be read.

    What is held is said by the entries alone, so that an interruption at any point leaves nothing to repair.
    """

    def __init__(
        self,
        source: Source,
        extents: Sequence[Sequence[Sequence[Extent]]],
        slots: Sequence[Slot],
        pack: Pack,
        *,
        capacity: int,
        in_place: bool,
    ) -> None:
        """extents[layer][expert]; at least one slot and one place."""
        self.counters = Counters()
        self.capacity = capacity
        self._source = source
        self._extents = extents
        self._slots = slots
        self._pack = pack
        self._in_place = in_place
        self._entries: dict[tuple[int, int], _Entry] = {}  # the one that was not used for longest comes first
        self._wanted: set[tuple[int, int]] = set()  # by the layer that computes: not to be evicted
        self.close = weakref.finalize(self, source.close)

    def describe(self) -> str:
        """How much of the model is held."""
        layers, experts = len(self._extents), len(self._extents[0])
        share = f"{self.capacity / layers:.3g} of {experts} a layer"
        return f"{self.capacity} of {layers * experts} are kept at a time, {share}"

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Packed]]:
        """Each of the experts once, as its id and what the kernel computes with: first those that are here.

        All that are missing are asked for at once, as far as there are slots, and come in that order. What was given
        is valid until the next is asked for.
        """
        self._forget_unfinished()
        self._wanted = {(layer, expert) for expert in experts}
        here = [expert for expert in experts if (layer, expert) in self._entries]
        missing = deque(expert for expert in experts if (layer, expert) not in self._entries)
        self.counters.hits += len(here)
        self.counters.misses += len(missing)
        for expert in here:
            self._entries[layer, expert] = self._entries.pop((layer, expert))
        coming = deque(here)
        self._read_ahead(layer, missing, coming)
        while coming:
            expert = coming.popleft()
            yield expert, self._ready(self._entries[layer, expert])
            self._used(self._entries[layer, expert])
            self._read_ahead(layer, missing, coming)
        assert not missing

    def _read_ahead(self, layer: int, missing: deque[int], coming: deque[int]) -> None:
        while missing:
            if len(self._entries) >= self.capacity and not self._evict(layer):
                return
            taken = {entry.slot for entry in self._entries.values()}
            slot = next((slot for slot in self._slots if slot not in taken), None)
            if slot is None:
                return
            expert = missing.popleft()
            entry = self._entries[layer, expert] = _Entry(layer, expert, Ticket(slot))
            self._source.start(entry.ticket, self._extents[layer][expert])
            coming.append(expert)

    def _ready(self, entry: _Entry) -> Packed:
        """Wait for an expert's bytes if need be, and pack them if that was not done."""
        if not entry.filled:
            start = time.perf_counter()
            try:
                self._source.wait(entry.ticket)
            finally:
                self.counters.waited_s += time.perf_counter() - start
                self.counters.bytes_read = self._source.bytes_read
            entry.filled = True
        if entry.packed is not None:
            return entry.packed
        start = time.perf_counter()
        extents = self._extents[entry.layer][entry.expert]
        packed = self._pack(entry.layer, entry.expert, data_in(entry.ticket.slot, extents))
        self.counters.packed_s += time.perf_counter() - start
        if not self._in_place:
            entry.ticket.slot.release()
            entry.packed = packed
        return packed

    def _used(self, entry: _Entry) -> None:
        if entry.slot is not None:
            entry.slot.release()
        self._wanted.discard((entry.layer, entry.expert))

    def _evict(self, layer: int) -> bool:
        """Give up an expert that `layer` does not want now; False if there is none.

        Layers take turns, so plain LRU over all of them would always evict what comes next. Each layer keeps a fair
        share instead: a layer above its share gives first, of those the one whose turn is farthest away, of its
        experts the one that was not used for longest.
        """
        n_layers = len(self._extents)
        fair = self.capacity / n_layers
        held = Counter(entry.layer for entry in self._entries.values())

        def gives(entry: _Entry) -> tuple[bool, int]:
            return held[entry.layer] > fair, (entry.layer - layer - 1) % n_layers

        unwanted = (entry for key, entry in self._entries.items() if key not in self._wanted)
        victim = max(unwanted, key=gives, default=None)
        if victim is None:
            return False
        del self._entries[victim.layer, victim.expert]
        return True

    def _forget_unfinished(self) -> None:
        """What an interruption or a fault left behind: the disk is needed for others now."""
        for key, entry in list(self._entries.items()):
            if not entry.filled:
                self._source.cancel(entry.ticket)
                del self._entries[key]
