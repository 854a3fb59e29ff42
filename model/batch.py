"""Continuous batching: many replies at once, a token each a step; rows join and leave while the others go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .decode import PREFILL_CHUNK, Row, prefill
from .kv_cache import KVCache

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM


class Batch:
    """Up to `rows` replies that are decoded together, and any number that wait for a free row.

    Prompts are read a chunk a step, so that a long one holds the others up no longer than that. What a prompt has in
    common with that of a row that is being decoded (a system message, a document) is copied, not read.
    """

    def __init__(self, network: DbrxForCausalLM, rows: int) -> None:
        self._network = network
        self._rows = rows
        self._waiting: deque[Row] = deque()
        self._joining: _Joining | None = None
        self._active: list[Row] = []  # in the order of the cache's rows
        self.cache = KVCache(network.config.n_layers, 0)

    def __len__(self) -> int:
        """Replies that are not complete."""
        return len(self._waiting) + len(self._active) + (len(self._joining.rows) if self._joining else 0)

    def add(self, row: Row) -> None:
        """Line up for a free row. `ValueError` for a prompt that is empty or fills the context."""
        if not row.prompt or row.left <= 0:
            raise ValueError(f"a prompt of {len(row.prompt)} tokens leaves {row.left} to be made")
        self._waiting.append(row)

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, int | None]]:
        """Decode, then read one chunk of the prompts that wait; returns the id that each row got, None for a fault.

        A row that is `done` has left when this returns. After an exception the batch is not to be used again.
        """
        new: list[tuple[Row, int | None]] = []
        if self._active:
            column = torch.tensor([[row.ids[-1]] for row in self._active], device=self._network.device)
            logits = self._network(column, past_key_values=self.cache).logits[:, -1]
            new += [(row, row.try_choose(scores)) for row, scores in zip(self._active, logits, strict=True)]
            for row in [row for row in self._active if row.done]:
                self._leave(row)
        if self._joining is None:
            self._joining = self._admit()
        if self._joining is not None and (scores := self._joining.read()) is not None:
            new += [(row, row.try_choose(each)) for row, each in zip(self._joining.rows, scores, strict=True)]
            for at, row in enumerate(self._joining.rows):
                if not row.done:
                    self._active.append(row)
                    self.cache.copy(self.cache.add(), self._joining.cache, at, len(row.prompt))
            self._joining = None
        return new

    def _admit(self) -> _Joining | None:
        """Those at the front of the line that fit into the free rows, to be read together."""
        free = self._rows - len(self._active)
        if not self._active:
            free = min(free, 1)  # the first one alone: what the others share with it is then copied from it
        group: list[Row] = []
        rests: list[int] = []
        cache = KVCache(self._network.config.n_layers, 0)
        while self._waiting and len(group) < free:
            row = self._waiting[0]
            source, row.cached = self._nearest(row.prompt)
            rests.append(len(row.prompt) - row.cached)
            # The shorter ones are padded: stop where that would be more than half of the work.
            if len(rests) * max(rests) > 2 * sum(rests):
                break
            group.append(self._waiting.popleft())
            at = cache.add()
            if row.cached:
                cache.copy(at, self.cache, source, row.cached)
        return _Joining(self._network, group, cache) if group else None

    def _nearest(self, prompt: Sequence[int]) -> tuple[int, int]:
        """The row whose prompt begins most like this one, and how many tokens of it can be taken over."""
        # The last token is read in any case: its logits are not kept.
        shared = [min(common_prefix(prompt, row.prompt), len(prompt) - 1) for row in self._active]
        length = max(shared, default=0)
        return (shared.index(length) if shared else 0), length

    def _leave(self, row: Row) -> None:
        at = self._active.index(row)
        self.cache.drop(at)
        self._active[at] = self._active[-1]  # as in the cache
        self._active.pop()


class _Joining:
    """Rows whose prompts are being read, in a cache of their own that holds what was copied."""

    def __init__(self, network: DbrxForCausalLM, rows: Sequence[Row], cache: KVCache) -> None:
        self.rows = rows
        self.cache = cache
        self._network = network
        rests = [row.prompt[row.cached :] for row in rows]
        width = max(map(len, rests))
        fills = [[0] * (width - len(rest)) for rest in rests]
        pairs = list(zip(fills, rests, strict=True))
        self._ids = torch.tensor([[*fill, *rest] for fill, rest in pairs], device=network.device)
        self._mask = torch.tensor([fill + [1] * len(rest) for fill, rest in pairs], device=network.device)
        self._at = 0

    def read(self) -> Tensor | None:
        """Read a chunk; logits [rows, vocab] behind the prompts after the last one."""
        part = slice(self._at, self._at + max(1, (self._network.prefill_chunk or PREFILL_CHUNK) // len(self.rows)))
        logits = prefill(self._network, self._ids[:, part], self.cache, self._mask[:, part])
        self._at = part.stop
        return logits if self._at >= self._ids.shape[1] else None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids at the front are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
