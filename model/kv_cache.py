"""Keys and values of the tokens that were read: blocks of tokens, and for each row of a batch a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import AttentionPlan
from .placement import KV_BLOCK

BLOCK_TOKENS = KV_BLOCK

Pair = tuple[Tensor, Tensor]


class KVBlock:
    """Keys and values [tokens, kv_heads, head_dim] of a block's tokens in each layer.

    A layer's are made when it is first written, on the device and in the dtype of what is written.
    """

    __slots__ = ("layers", "sealed")

    def __init__(self, n_layers: int) -> None:
        self.layers: list[Pair | None] = [None] * n_layers
        self.sealed = False  # several rows may hold it: nobody writes into it any more

    def copy(self, tokens: int) -> KVBlock:
        """A block with the first `tokens` tokens of this one."""
        new = KVBlock(len(self.layers))
        for layer, parts in enumerate(self.layers):
            if parts is not None:
                made = new.layers[layer] = _buffers(parts[0], len(parts[0]))
                for mine, theirs in zip(made, parts, strict=True):
                    mine[:tokens] = theirs[:tokens]
        return new

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in filter(None, self.layers))


class Pointers(NamedTuple):
    """Where the keys and the values of a row's blocks lie in one layer, for the native library."""

    keys: Array[c_void_p]
    values: Array[c_void_p]
    room: int  # tokens that the blocks hold
    strides: tuple[int, ...]  # of a token and of a head, in numbers


class KVRow:
    """Keys and values of one sequence: a table of blocks, the tokens one behind the other without gaps.

    Rows share blocks: of what two sequences have in common the full blocks are held by both and never written again;
    the last, partial one is copied. What is written behind `length` counts only when `length` is raised.
    """

    def __init__(self, n_layers: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.length = 0
        self.blocks: list[KVBlock] = []
        self.block_tokens = block_tokens
        self._pointers: list[Pointers | None] = [None] * n_layers

    @property
    def n_layers(self) -> int:
        return len(self._pointers)

    @property
    def nbytes(self) -> int:
        """Bytes of all its blocks, those that others hold, too, among them."""
        return sum(block.nbytes for block in self.blocks)

    def trim(self, length: int) -> None:
        """Forget the tokens from `length` on. A block more is kept, for what comes next."""
        if not 0 <= length <= self.length:
            raise ValueError(f"the row has {self.length} tokens; cannot trim it to {length}")
        self._hold(self.blocks, length)

    def take(self, source: KVRow, length: int) -> None:
        """Hold the first `length` tokens of another row of the same network, and nothing else."""
        if not 0 <= length <= source.length:
            raise ValueError(f"the row has {source.length} tokens; cannot take {length}")
        for block in source.blocks[: length // self.block_tokens]:
            block.sealed = True
        full, rest = divmod(length, self.block_tokens)
        last = [source.blocks[full].copy(rest)] if rest else []
        self._hold([*source.blocks[:full], *last], length)

    def _hold(self, blocks: Sequence[KVBlock], length: int) -> None:
        full, rest = divmod(length, self.block_tokens)
        kept = [*blocks[:full], *(block for block in blocks[full : full + 2] if not block.sealed)]
        if rest and any(block.sealed for block in blocks[full : full + 1]):
            kept.insert(full, blocks[full].copy(rest))
        if kept != self.blocks:
            self.blocks = kept
            self._pointers = [None] * self.n_layers
        self.length = length

    def pointers(self, layer: int, like: Tensor, room: int) -> Pointers:
        """The layer's blocks for at least `room` tokens, which are made where they are missing.

        like [..., kv_heads, head_dim]: of the device and dtype of what is written.
        """
        found = self._pointers[layer]
        if found is None or found.room < room:
            found = self._pointers[layer] = self._make_room(layer, like, room)
        return found

    def _make_room(self, layer: int, like: Tensor, room: int) -> Pointers:
        while len(self.blocks) * self.block_tokens < room:
            self.blocks.append(KVBlock(self.n_layers))
        pairs = []
        for block in self.blocks:
            pair = block.layers[layer] = block.layers[layer] or _buffers(like, self.block_tokens)
            pairs.append(pair)
        keys, values = ([part.data_ptr() for part in parts] for parts in zip(*pairs, strict=True))
        table = c_void_p * len(pairs)
        return Pointers(table(*keys), table(*values), len(pairs) * self.block_tokens, pairs[0][0].stride()[:2])

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Put k, v [tokens, kv_heads, head_dim] of a layer behind the first `start` tokens."""
        if len(k):
            self.pointers(layer, k, start + len(k))
        for at, keys, values in self._parts(layer, start, start + len(k)):
            keys.copy_(k[at : at + len(keys)])
            values.copy_(v[at : at + len(keys)])

    def read(self, layer: int, start: int, stop: int) -> Pair:
        """Keys and values [stop - start, kv_heads, head_dim] of a layer; a view where they lie in one block."""
        _, keys, values = zip(*self._parts(layer, start, stop), strict=True)
        return (keys[0], values[0]) if len(keys) == 1 else (_joined(keys), _joined(values))

    def copy_to(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the layer's first tokens to keys, values [tokens, kv_heads, head_dim]."""
        for at, k, v in self._parts(layer, 0, len(keys)):
            keys[at : at + len(k)] = k
            values[at : at + len(k)] = v

    def _parts(self, layer: int, start: int, stop: int) -> list[tuple[int, Tensor, Tensor]]:
        """Views of the tokens from `start` to `stop`, block by block, each with how many of these come before it.

        Of 256 tokens a block, 500 to 520 are 244 to 256 of block 1, and 12 tokens behind it 0 to 8 of block 2.
        """
        size, parts = self.block_tokens, []
        for number in range(start // size, -(-stop // size)):
            first, last = max(start, number * size), min(stop, (number + 1) * size)
            pair = self.blocks[number].layers[layer]
            assert pair is not None
            part = slice(first - number * size, last - number * size)
            parts.append((first - start, pair[0][part], pair[1][part]))
        return parts


class KVCache:
    """The rows of one step over a batch: append, advance, trim.

    `append` writes behind the rows' ends; only `advance`, after the last layer, makes a step count: a forward pass that
    is interrupted leaves no trace.
    """

    def __init__(self, n_layers: int, rows: int = 1, block_tokens: int = BLOCK_TOKENS) -> None:
        self.rows = [KVRow(n_layers, block_tokens) for _ in range(rows)]
        self._ahead = [0] * rows
        self.block_tokens = block_tokens

    @classmethod
    def of(cls, rows: Sequence[KVRow], ahead: Sequence[int] | None = None) -> KVCache:
        """One step over these rows. A row may be there several times, once for each token that it gets.

        ahead: how many of its tokens come before this one in the same step.
        """
        cache = cls(rows[0].n_layers, 0, rows[0].block_tokens) if rows else cls(0, 0)
        cache.rows, cache._ahead = list(rows), list(ahead or [0] * len(rows))
        return cache

    def __len__(self) -> int:
        """Tokens in the longest row."""
        return max(self.lengths, default=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row before the step."""
        return [row.length + ahead for row, ahead in zip(self.rows, self._ahead, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in {block for row in self.rows for block in row.blocks})

    def get_seq_length(self) -> int:
        """The same as `len`, under the name that transformers uses."""
        return len(self)

    def append(self, layer: int, k: Tensor, v: Tensor, plan: AttentionPlan) -> Pair:
        """Write one step's k, v [rows, seq, kv_heads, head_dim] of a layer; return all of its keys and values."""
        k, v = plan.compact(k), plan.compact(v)
        for i, (row, start, stop) in enumerate(zip(self.rows, plan.starts, plan.lengths, strict=True)):
            row.write(layer, start, k[i, : stop - start], v[i, : stop - start])
        if not any(plan.starts):
            return k[:, : plan.kv_len], v[:, : plan.kv_len]
        if len(set(map(id, self.rows))) == 1:
            keys, values = self.rows[0].read(layer, 0, plan.kv_len)
            return keys[None].expand(len(k), -1, -1, -1), values[None].expand(len(k), -1, -1, -1)
        # Zeros, not empty: what lies behind a short row is masked, but 0 x NaN would still be NaN.
        shape = len(k), k.shape[2], plan.kv_len, k.shape[3]
        keys, values = k.new_zeros(shape).transpose(1, 2), k.new_zeros(shape).transpose(1, 2)
        for i, (row, stop) in enumerate(zip(self.rows, plan.lengths, strict=True)):
            row.copy_to(layer, keys[i, :stop], values[i, :stop])
        return keys, values

    def advance(self, plan: AttentionPlan) -> None:
        """Make the step that was appended to every layer count."""
        for row, length in zip(self.rows, plan.lengths, strict=True):
            row.length = length
        self._ahead = [0] * len(self.rows)

    def trim(self, row: int, length: int) -> None:
        """Forget the tokens of a row from `length` on."""
        self.rows[row].trim(length)


def _buffers(like: Tensor, tokens: int) -> Pair:
    # A head's tokens one behind the other, which is how attention reads them: on a CPU in half the time.
    shape = like.shape[-2], tokens, like.shape[-1]
    with torch.inference_mode(False):  # what is made inside of it cannot be written into outside
        return like.new_empty(shape).transpose(0, 1), like.new_empty(shape).transpose(0, 1)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Parts [tokens, heads, head_dim] one behind the other, as `_buffers` has them in memory."""
    return torch.cat([part.transpose(0, 1) for part in parts], dim=1).transpose(0, 1)
