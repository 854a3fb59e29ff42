"""One pool of blocks for all rows of a network: what was read is named by its ids, shared, kept while there is room.

A block of 256 tokens is named by the hash of all ids up to its end, so equal texts find each other's blocks. Rows hold
full blocks by reference; the last, partial one of a finished row is kept, too, and copied by whoever goes on from it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Ids
from typing import TYPE_CHECKING, NamedTuple

from .errors import NotFiniteError, ResourceError
from .kv_cache import BLOCK_TOKENS, KVBlock, KVRow
from .saved_cache import Layout
from .sequence import Sequence, common_prefix

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

FRONT = b""  # the name of what is before the first block


class PoolStats(NamedTuple):
    """What a pool holds now, in bytes, and what it has saved since it was made, in tokens."""

    budget_bytes: int | None
    used_bytes: int  # of blocks that rows hold
    cached_bytes: int  # of blocks that are only kept, and give way where rows need the room
    prompt_tokens: int  # of all rows that were admitted, the replies that they go on from among them
    cached_tokens: int  # of these, how many were found instead of read


class _Kept(NamedTuple):
    """A block that was read; fewer ids than a block has are the end of a text."""

    before: bytes  # the name of the block before it
    ids: list[int]
    block: KVBlock


class KVPool:
    """Keys and values of all rows that a scheduler has, and of those that left, the least recently used in front.

    It outlives schedulers, of which it serves one at a time. All calls in one thread, `stats` too. A scheduler
    `admit`s its rows and `release`s them: finished, cancelled or failed; a row that is not released counts.
    """

    def __init__(
        self, network: DbrxForCausalLM, budget_bytes: int | None = None, block_tokens: int = BLOCK_TOKENS
    ) -> None:
        """budget_bytes: of rows and of what is kept together; None: no limit, for a batch that comes to an end."""
        self.budget_bytes = budget_bytes
        self.block_tokens = block_tokens
        self._network = network
        self._live: dict[Sequence, int] = {}  # rows, and how many blocks each may come to hold
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # each before the block that it goes on from
        self._behind: dict[bytes, set[bytes]] = {}  # names of the blocks that follow one
        self._prompt_tokens = self._cached_tokens = 0

    def stats(self) -> PoolStats:
        """Sizes and counts, such as a server publishes."""
        used = self._used()
        cached = sum(kept.block.nbytes for kept in self._kept.values() if kept.block not in used)
        nbytes = sum(block.nbytes for block in used)
        return PoolStats(self.budget_bytes, nbytes, cached, self._prompt_tokens, self._cached_tokens)

    def find(self, ids: list[int]) -> tuple[int, KVRow]:
        """How many ids at the front were read at most, and a row that holds them: to `take` from, not to write to."""
        found = self._find_kept(ids)
        best, source = found.length, found
        for row in self._live:
            assert row.kv is not None
            if (common := min(common_prefix(ids, row.known), row.kv.length)) > best:
                best, source = common, row.kv
        return best, source

    def require_room(self, row: Sequence) -> None:
        """`ResourceError` with the numbers for a row that the budget would not hold if it were alone."""
        if self.budget_bytes is None:
            return
        needed = kv_bytes(self._network, row.most_tokens, self.block_tokens)
        if needed > self.budget_bytes:
            raise ResourceError(
                f"a prompt of {len(row.prompt)} tokens and a reply of up to {row.most_tokens - len(row.prompt)} need "
                f"{needed / 1e6:.0f} MB of keys and values, and there are {self.budget_bytes / 1e6:.0f} MB for them",
                "shorten the prompt, or ask for fewer tokens",
            )

    def admit(self, row: Sequence, source: KVRow, ready: int) -> bool:
        """Let a row hold the first `ready` tokens of `source`, and grow to its end; False while there is no room.

        What is kept gives way to it; what other rows hold, or may come to hold, does not.
        """
        assert row.kv is not None
        needed = -(-row.most_tokens // self.block_tokens)
        shared = source.blocks[: ready // self.block_tokens]
        if not self._make_room(shared, needed - len(shared)):
            return False
        if source is row.kv:
            source.trim(ready)
        else:
            row.kv.take(source, ready)
        row.cached_tokens = ready
        self._live[row] = needed
        self._prompt_tokens += len(row.known)
        self._cached_tokens += ready
        return True

    def release(self, row: Sequence) -> None:
        """Keep what a row has read, which it shares from now on; nothing for one that was not admitted."""
        if self._live.pop(row, None) is not None and not isinstance(row.fault, NotFiniteError):
            assert row.kv is not None
            self.keep(row.kv, row.known)

    def release_all(self) -> None:
        """`release` every row: of a scheduler that is no more."""
        for row in list(self._live):
            self.release(row)

    def keep(self, kv: KVRow, ids: list[int]) -> None:
        """Keep keys and values of the first ids, as far as `kv` holds them; it is written to no more."""
        name, path, end = FRONT, list[bytes](), min(kv.length, len(ids))
        for block, start in zip(kv.blocks, range(0, end, self.block_tokens), strict=False):
            part = ids[start : min(start + self.block_tokens, end)]
            following = _name(name, part)
            if following in self._kept or self._add(following, _Kept(name, part, block)):
                path.append(following)
            name = following
        self._touch(path)
        self._make_room((), 0)

    def clear(self) -> None:
        """Give back all that is kept, and forget the rows: of a scheduler whose memory ran out."""
        self._live.clear()
        self._kept.clear()
        self._behind.clear()

    def _find_kept(self, ids: list[int]) -> KVRow:
        found, name, path = KVRow(self._network.config.n_layers, self.block_tokens), FRONT, list[bytes]()
        while part := ids[found.length : found.length + self.block_tokens]:
            following = _name(name, part)
            if following not in self._kept:
                behind = self._behind.get(name, ())
                following = max(behind, key=lambda each: common_prefix(part, self._kept[each].ids), default=FRONT)
            kept = self._kept.get(following)
            common = common_prefix(part, kept.ids) if kept is not None else 0
            if kept is None or not common:
                break
            path.append(following)
            found.blocks.append(kept.block)
            found.length += common
            if common < self.block_tokens:
                break
            name = following
        self._touch(path)
        return found

    def _touch(self, path: list[bytes]) -> None:
        """These blocks of one text were used. The first one last, so that it gives way after those that follow it."""
        for name in reversed(path):
            self._kept.move_to_end(name)

    def _add(self, name: bytes, new: _Kept) -> bool:
        """Keep a block beside those that follow the same one, but for what is the front of another."""
        beside = {other: self._kept[other].ids for other in self._behind.get(new.before, ())}
        if any(ids[: len(new.ids)] == new.ids for ids in beside.values()):
            return False
        for other in [other for other, ids in beside.items() if new.ids[: len(ids)] == ids]:
            self._drop(other)
        new.block.sealed = True
        self._kept[name] = new  # before others point to it: an interrupt may come between any two lines
        self._behind.setdefault(new.before, set()).add(name)
        return True

    def _drop(self, name: bytes) -> None:
        before = self._kept[name].before
        others = self._behind.get(before, set()) - {name}
        if others:
            self._behind[before] = others
        else:
            self._behind.pop(before, None)
        del self._kept[name]

    def _used(self) -> set[KVBlock]:
        return {block for row in self._live if row.kv is not None for block in row.kv.blocks}

    def _make_room(self, shared: Ids[KVBlock], more: int) -> bool:
        """Whether a further row may hold `shared` and as many `more` blocks; of what is kept enough gives way."""
        if self.budget_bytes is None:
            return True
        used = self._used() | {*shared}
        more += sum(most - len(row.kv.blocks) for row, most in self._live.items() if row.kv is not None)
        room = self.budget_bytes // kv_bytes(self._network, 1, self.block_tokens) - len(used) - more
        if room < 0:
            return False
        unused = [name for name, kept in self._kept.items() if kept.block not in used]
        for name in unused[: max(0, len(unused) - room)]:
            self._drop(name)
        return True


class OneRow(KVPool):
    """For a network that is split over ranks: followers know rows as wholes, so the last one goes on as itself."""

    def __init__(self, network: DbrxForCausalLM) -> None:
        super().__init__(network)
        self._ids, self._kv = list[int](), KVRow(network.config.n_layers)

    def find(self, ids: list[int]) -> tuple[int, KVRow]:
        return min(common_prefix(ids, self._ids), self._kv.length), self._kv

    def admit(self, row: Sequence, source: KVRow, ready: int) -> bool:
        row.kv = source
        return super().admit(row, source, ready)

    def keep(self, kv: KVRow, ids: list[int]) -> None:
        kv.trim(min(kv.length, len(ids)))
        self._ids, self._kv = ids, kv


def kv_bytes(network: DbrxForCausalLM, tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Bytes of the blocks that keys and values of so many tokens take."""
    layout = Layout.of(network)
    token = 2 * layout.kv_heads * layout.head_dim * layout.dtype.itemsize * len(layout.devices)
    return -(-tokens // block_tokens) * block_tokens * token


def _name(before: bytes, ids: Ids[int]) -> bytes:
    """Of a block: whoever could make two texts of one name would read another's conversation, hence SHA-256."""
    return hashlib.sha256(before + array("q", ids).tobytes()).digest()
