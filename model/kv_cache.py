"""Keys and values of the tokens that were read, a row a sequence, each row with a length of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import AttentionPlan


class KVCache:
    """Preallocated [rows, capacity, kv_heads, head_dim] a layer: append, advance, trim; add, copy and drop of rows.

    A layer's buffer is made on its first append, on the device and in the dtype of what is appended, and grows by
    doubling. A row holds its tokens without gaps (padding is never stored). `append` writes behind the rows' ends;
    only `advance`, after the last layer, makes a step count: a forward pass that is interrupted leaves no trace.
    """

    def __init__(self, n_layers: int, rows: int = 1, capacity: int = 256) -> None:
        self.lengths = [0] * rows
        self.capacity = capacity
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers

    def __len__(self) -> int:
        """Tokens in the longest row."""
        return max(self.lengths, default=0)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(k.nbytes + v.nbytes for k, v in filter(None, self._layers))

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's buffers of keys and values; none before the first append."""
        return [parts for parts in self._layers if parts is not None]

    def get_seq_length(self) -> int:
        """The same as `len`, under the name that transformers uses."""
        return len(self)

    def append(self, layer: int, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Write one step's k, v [rows, seq, kv_heads, head_dim] of a layer; return all of its keys and values."""
        end = plan.kv_len
        keys, values = self.room(layer, k, end)
        if plan.uniform:
            start = end - plan.seq
            keys[:, start:end] = k
            values[:, start:end] = v
        elif plan.valid is None:
            where = torch.arange(self.rows, device=k.device)[:, None], plan.positions.to(k.device)
            keys[where], values[where] = k, v
        else:
            k, v = plan.compact(k), plan.compact(v)
            for row, (start, stop) in enumerate(zip(plan.starts, plan.lengths, strict=True)):
                keys[row, start:stop] = k[row, : stop - start]
                values[row, start:stop] = v[row, : stop - start]
        return keys[:, :end], values[:, :end]

    def room(self, layer: int, like: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [rows, capacity, kv_heads, head_dim], with room for `needed` tokens a row.

        like [rows, seq, kv_heads, head_dim]: of the device and dtype of what is appended.
        """
        found = self._layers[layer]
        if found is None or found[0].shape[1] < needed or found[0].shape[0] < self.rows:
            found = self._layers[layer] = self._grown(layer, like, needed)
        keys, values = found
        if keys.shape[0] == self.rows:
            return found
        return keys[: self.rows], values[: self.rows]

    def advance(self, plan: AttentionPlan) -> None:
        """Make the step that was appended to every layer count."""
        self.lengths = list(plan.lengths)

    def trim(self, row: int, length: int) -> None:
        """Forget the tokens of a row from `length` on; the next append overwrites them."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"row {row} has {self.lengths[row]} tokens; cannot trim it to {length}")
        self.lengths[row] = length

    def add(self) -> int:
        """Make room for one more row, an empty one behind the others; returns its number."""
        self.lengths.append(0)
        return self.rows - 1

    def copy(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """Let a row hold the first `length` tokens of a row of `source`, a cache of the same network."""
        if not 0 <= length <= source.lengths[source_row]:
            raise ValueError(f"row {source_row} has {source.lengths[source_row]} tokens; cannot copy {length}")
        for layer, theirs in enumerate(source._layers):
            if theirs is not None and length:
                for mine, other in zip(self.room(layer, theirs[0], length), theirs, strict=True):
                    mine[row, :length] = other[source_row, :length]
        self.lengths[row] = length

    def drop(self, row: int) -> None:
        """Take a row out; the last one takes its place and number."""
        last = self.rows - 1
        if row != last:
            self.copy(row, self, last, self.lengths[last])
        del self.lengths[last]

    def _grown(self, layer: int, like: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        while self.capacity < needed:
            self.capacity *= 2
        old = self._layers[layer]
        rows = self.rows if old is None else max(self.rows, old[0].shape[0])
        shape = (rows, like.shape[2], self.capacity, like.shape[3])
        # A head's tokens one behind the other, which is how attention reads them: on a CPU in half the time.
        # Zeros, not empty: what lies behind a short row is masked, but 0 x NaN would still be NaN.
        new = like.new_zeros(shape).transpose(1, 2), like.new_zeros(shape).transpose(1, 2)
        if old is not None:
            for buffer, before in zip(new, old, strict=True):
                buffer[: before.shape[0], : before.shape[1]] = before
        return new
