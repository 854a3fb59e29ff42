"""What one step's attention must know, worked out once, outside the layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class AttentionPlan:
    """Lengths, positions and masks of one step.

    Each row holds its keys without gaps; padding (left, right or between) has none. Causal and aligned to the end:
    the step's n-th real token of a row sees that row's first `start + n + 1` keys.

    `seq` columns are computed; `starts` and `lengths` are the rows' keys before and after the step; `uniform` says
    that all rows are equally long and none has padding, so that no mask is needed beyond causality; `one_each` that
    each row has one token.
    """

    def __init__(self, starts: Sequence[int], seq: int, valid: Tensor | None, device: torch.device) -> None:
        """valid [batch, seq] bool marks real tokens; None means all."""
        if valid is not None and bool(valid.all()):
            valid = None
        self.seq = seq
        self.starts = list(starts)
        self.valid = valid
        self.device = device
        counts = [seq] * len(self.starts) if valid is None else [int(n) for n in valid.sum(1)]
        self.lengths = [start + count for start, count in zip(self.starts, counts, strict=True)]
        self.uniform = valid is None and len(set(self.starts)) == 1
        self.one_each = valid is None and seq == 1
        self._masks: dict[torch.device, Tensor] = {}

    @property
    def kv_len(self) -> int:
        """Keys of the longest row; at least 1, so that a step of nothing but padding has something to look at."""
        return max(1, *self.lengths)

    @cached_property
    def positions(self) -> Tensor:
        """[batch, seq] index of each token among its row's keys; padding repeats its neighbour, never below 0."""
        starts = torch.tensor(self.starts, device=self.device)[:, None]
        if self.valid is None:
            return starts + torch.arange(self.seq, device=self.device)
        return (starts + self.valid.cumsum(1) - 1).clamp(min=0)

    @cached_property
    def keys(self) -> Tensor:
        """[kv_len] index of each key."""
        return torch.arange(self.kv_len, device=self.device)

    def mask(self, device: torch.device) -> Tensor:
        """[batch, 1, seq, kv_len] bool, True where a query sees a key."""
        if device not in self._masks:
            last = self.positions[:1] if self.uniform else self.positions
            self._masks[device] = (self.keys <= last[..., None])[:, None].to(device)
        return self._masks[device]

    def compact(self, x: Tensor) -> Tensor:
        """Move each row's real tokens to its front: x [batch, seq, heads, head_dim] -> the same shape."""
        if self.valid is None:
            return x
        order = self._order.to(x.device)[..., None, None].expand_as(x)
        return x.gather(1, order)

    def spread(self, weights: Tensor) -> Tensor:
        """Give attention weights [batch, heads, seq, keys] a column of zeros for each padding token of the step.

        Only while no earlier step is cached: its padding was never stored.
        """
        if self.valid is None or any(self.starts):
            return weights
        valid = self.valid.to(weights.device)
        source = (valid.cumsum(1) - 1).clamp(min=0)[:, None, None].expand(*weights.shape[:3], -1)
        return weights.gather(-1, source) * valid[:, None, None]

    @cached_property
    def _order(self) -> Tensor:
        assert self.valid is not None
        return (~self.valid).to(torch.uint8).argsort(dim=1, stable=True)
