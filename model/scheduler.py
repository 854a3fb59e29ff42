"""Continuous batching: each step gives every row of a batch its next ids; rows join and leave while the others go on.

A single conversation is a batch of one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kv_cache import KVCache, KVRow
from .kv_pool import KVPool
from .sampling import MAX_LOOKUP
from .sequence import Sequence, common_prefix

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

GEMV_ROWS = 16  # tokens of a step up to which each is computed as it would be alone; drafts of a batch leave it there


class Coming:
    """Numbers on their way from a card."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._there = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None

    def read(self) -> list[list[int]]:
        """Wait for them, and not for what was begun later."""
        if self._there is not None:
            self._there.synchronize()
        found: list[list[int]] = self._numbers.tolist()
        return found


@dataclass
class Ahead:
    """A step that was begun before the host knew the ids that it reads; by now it does."""

    rows: list[Sequence]
    logits: Tensor  # [rows, vocab], behind these ids
    begun: float

    def logits_of(self, rows: Ids[Sequence]) -> Tensor:
        """Logits of those that go on; now their keys count."""
        for row in rows:
            _kv(row).length += 1
        return _some(self.logits, [i for i, row in enumerate(self.rows) if row in rows])


class Scheduler:
    """Up to `rows` sequences that are decoded together, and any number that wait for a free place.

    `add` rows, call `step` until none is left (`len`), `cancel` a row between two steps; all in one thread. A row that
    is `done` has left; what its `kv` holds is shared with the pool. An exception from `step` is of the whole batch
    (memory that ran out, an interrupt): `cancel` its rows, which keep what they have, and make another scheduler; the
    pool goes on (`KVPool.clear` gives memory back).

    Prompts are read a chunk a step, so that a long one holds the others up no longer than that. What a prompt has in
    common with a row that is there or was (a system message, the conversation so far) is taken over, not read: see
    `cached_tokens` of the row. A row waits until the pool's budget holds its prompt and the longest reply it may get.
    """

    def __init__(self, network: DbrxForCausalLM, rows: int, pool: KVPool | None = None) -> None:
        """pool: a server's or a conversation's, with its budget of bytes; None: one for these rows, without a limit."""
        self._network = network
        self._rows = rows
        self._pool = pool or KVPool(network)
        self._pool.release_all()  # of a scheduler before this one, where an interrupt struck while it cancelled them
        self._waiting: list[Sequence] = []
        self._reading: list[Sequence] = []  # their prompts; the one that came first in front
        self._active: list[Sequence] = []
        self._ahead: Ahead | None = None
        self._oldest_first = False

    def __len__(self) -> int:
        """Rows that are not complete."""
        return len(self._waiting) + len(self._reading) + len(self._active)

    @property
    def waiting(self) -> int:
        """Rows that have no place, or no room in the pool."""
        return len(self._waiting)

    @property
    def cache(self) -> KVCache:
        """Keys and values of the rows that have a place, to tell their size."""
        return KVCache.of([_kv(row) for row in (*self._reading, *self._active)])

    def add(self, row: Sequence) -> None:
        """Line up for a free place; nothing for a row that is done.

        `ValueError` for a prompt that leaves no room in the context, `ResourceError` for a row that would not fit into
        the pool if it were alone.
        """
        config = self._network.config
        row.max_context = min(row.max_context, config.max_seq_len)
        row.kv = row.kv or KVRow(config.n_layers, self._pool.block_tokens)
        if row.done:
            return
        if not row.prompt or row.left <= 0:
            raise ValueError(f"a prompt of {len(row.prompt)} tokens leaves {row.left} to be made")
        self._pool.require_room(row)
        if not len(self):
            self._network.place_by_use()
        self._waiting.append(row)

    def cancel(self, row: Sequence) -> None:
        """Let a row leave, wherever it is; nothing for one that has left. What it has read stays in the pool."""
        row.done = True
        self._let_go()
        self._pool.release(row)  # if an interrupt struck while it was on its way from one of the lists to another

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, int]]:
        """Decode, then read one chunk of the prompts that wait; returns the new ids with their rows, in their order.

        A row gets none while its prompt is read or where a fault ended it, several where drafts were right.
        """
        new = self._decode()
        self._admit()
        new += self._read()
        self._let_go()
        return new

    def _let_go(self) -> None:
        for rows in (self._waiting, self._reading, self._active):
            for row in [row for row in rows if row.done]:
                rows.remove(row)
                self._pool.release(row)

    def _decode(self) -> list[tuple[Sequence, int]]:
        """A step of all active rows, or what follows from one that has begun."""
        ahead, self._ahead = self._ahead, None
        rows = [row for row in self._active if ahead is None or row in ahead.rows]
        if not rows:
            return []
        begun = time.perf_counter() if ahead is None else ahead.begun
        most = MAX_LOOKUP if len(rows) == 1 else max(0, GEMV_ROWS - len(rows)) // len(rows)
        drafts = [row.draft(most) for row in rows]
        can_run_ahead = self._network.runs_ahead and rows == self._active and all(row.runs_ahead for row in rows)
        runs_ahead = can_run_ahead and not any(drafts)  # these are worth more, and the id before them has to be known
        if ahead is None:
            logits = self._compute(rows, drafts)
        else:
            logits, drafts = ahead.logits_of(rows), [[]] * len(rows)
        if runs_ahead:
            new = self._go_ahead(rows, logits, begun)
        else:
            each = torch.split(logits, [1 + len(draft) for draft in drafts])
            parts = zip(rows, drafts, each, strict=True)
            new = [(row, token) for row, draft, scores in parts for token in row.verify(draft, scores, begun)]
        self._let_go()
        return new

    def _compute(self, rows: Ids[Sequence], drafts: Ids[Ids[int]]) -> Tensor:
        """Logits behind the newest id of each row and its drafts; one is a row by itself with its row's keys."""
        counts = [1 + len(draft) for draft in drafts]
        tokens = [[token] for row, draft in zip(rows, drafts, strict=True) for token in (row.ids[-1], *draft)]
        several = [_kv(row) for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        cache = KVCache.of(several, [ahead for count in counts for ahead in range(count)])
        logits: Tensor = self._network(torch.tensor(tokens, device=self._network.device), past_key_values=cache).logits
        for row, draft in zip(rows, drafts, strict=True):
            _kv(row).length -= len(draft)  # of these each counts when it is verified: an interrupt leaves no wrong keys
        return logits[:, -1]

    def _go_ahead(self, rows: Ids[Sequence], logits: Tensor, begun: float) -> list[tuple[Sequence, int]]:
        """Choose ids where the logits [rows, vocab] lie, and begin the step behind them before they are known here.

        A row that they end has begun a step for nothing.
        """
        chosen = torch.stack([row.choose(scores) for row, scores in zip(rows, logits, strict=True)])
        coming = Coming(chosen)
        going = [i for i, row in enumerate(rows) if row.left > 1]
        if going:
            kept = [_kv(rows[i]) for i in going]
            behind = self._network(_some(chosen, going)[:, :1], past_key_values=KVCache.of(kept)).logits[:, -1]
            for kv in kept:
                kv.length -= 1  # it counts when the id is known
        numbers, now = coming.read(), time.perf_counter()
        if going:
            self._ahead = Ahead([rows[i] for i in going], behind, now)
        return [
            (row, id) for row, (id, fine) in zip(rows, numbers, strict=True) for id in row.take(id, fine, now - begun)
        ]

    def _admit(self) -> None:
        """Give those that wait the free places while the pool has room, with what they can take over."""
        for row in list(self._waiting):
            there = (*self._active, *self._reading)
            if len(there) == self._rows:
                return
            known = row.known
            found = self._pool.find(known)
            ready, source = max((min(_kv(row).length, len(known)), _kv(row)), found, key=itemgetter(0))
            if ready < len(known):
                row.logits = None
            later = max((common_prefix(known, other.known) for other in there), default=0)
            # What another row is about to read is worth a wait: anything while none is decoded (what all share is read
            # once), then only much of what this row would read (or they would come one by one).
            if later - ready > ((len(known) - ready) // 4 if self._active else 0):
                continue
            ready = min(ready, len(known) - (row.logits is None))  # without its logits the last is read again
            if not self._pool.admit(row, source, ready):
                return  # and so do all that came later: else a long one would wait for ever
            self._waiting.remove(row)
            self._reading.append(row)
            if row.on_read is not None and _unread(row):
                row.on_read()

    def _read(self) -> list[tuple[Sequence, int]]:
        """Read a chunk of some prompts, and choose the first ids of those that are whole."""
        if group := self._group():
            hidden = self._read_chunk(group)
            whole = [i for i, row in enumerate(group) if _unread(row) == 0]
            if whole:  # only for these: [rows, 100352] floats
                for i, logits in zip(whole, self._network.lm_head(hidden[whole]), strict=True):
                    group[i].logits = logits
            for row in group:
                if row.on_read is not None:
                    row.on_read()
        ready = [(row, row.logits) for row in self._reading if row.logits is not None]
        self._reading = [row for row in self._reading if row.logits is None]
        self._active += [row for row, _ in ready]
        return [(row, token) for row, logits in ready for token in row.verify((), logits[None])]

    def _read_chunk(self, group: Ids[Sequence]) -> Tensor:
        """Read the next ids of each, padded on the left; hidden states [rows, d_model] of the last ones."""
        parts = [row.known[_kv(row).length :][: self._chunk(len(group))] for row in group]
        width = max(map(len, parts))
        fills = [[0] * (width - len(part)) for part in parts]
        device = self._network.device
        ids = torch.tensor([[*fill, *part] for fill, part in zip(fills, parts, strict=True)], device=device)
        mask = torch.tensor([fill + [1] * len(part) for fill, part in zip(fills, parts, strict=True)], device=device)
        cache = KVCache.of([_kv(row) for row in group])
        hidden: Tensor = self._network.transformer(ids, mask, past_key_values=cache, last_only=True).last_hidden_state
        return hidden[:, -1]

    def _group(self) -> list[Sequence]:
        """Whose prompts are read together now. In turn the oldest and the shortest is among them for certain.

        The shorter ones are padded to the longest; only so many join that this is no more than half of the work.
        """
        waiting = [row for row in self._reading if row.logits is None]
        order = sorted(waiting, key=_unread)
        if self._oldest_first:
            order.sort(key=lambda row: row is not waiting[0])
        self._oldest_first = not self._oldest_first
        group: list[Sequence] = []
        for row in order:
            counts = [min(_unread(each), self._chunk(len(group) + 1)) for each in (*group, row)]
            if len(counts) * max(counts) <= 2 * sum(counts):
                group.append(row)
        return group

    def _chunk(self, rows: int) -> int:
        return max(1, self._network.prefill_chunk // rows)


def _some(numbers: Tensor, which: Ids[int]) -> Tensor:
    """These rows of a tensor, in order. To index with them would send them to its card, and wait for it."""
    return numbers if len(which) == len(numbers) else torch.stack([numbers[i] for i in which])


def _kv(row: Sequence) -> KVRow:
    assert row.kv is not None  # `add` saw to it
    return row.kv


def _unread(row: Sequence) -> int:
    return len(row.prompt) + len(row.ids) - _kv(row).length
