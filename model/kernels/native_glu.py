"""Experts of the native library: all that a layer's tokens chose in one call, or one at a time as they are streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from ..native.tensors import Experts
from ..quantization import SCHEMES
from ..quantization.equalize import equalizer
from .base import Packed
from .native_call import ACTIVATIONS, CALL, function, quantize, room
from .native_kept import NativeKept
from .native_linear import NativeLinear

if TYPE_CHECKING:
    from ..native.abi import Matrix
    from ..weights import FloatExpert, QuantizedExpert


class Prepared(NamedTuple):
    """A layer's input: in which dtype, and in float32."""

    dtype: torch.dtype
    x: Tensor


class NativeGlu:
    """An expert as its three matrices; nothing is copied that can be read as it lies."""

    def __init__(self, linear: NativeLinear | NativeKept, activation: str) -> None:
        self.linear = linear
        self.reads_stored = linear.reads_stored
        self.activation = ACTIVATIONS[activation]
        self.name = linear.name
        self.quantization = linear.quantization

    def pack(self, expert: FloatExpert) -> Packed:
        if self.quantization == "none":
            return self.linear.pack(expert.w1, expert.v1, expert.w2.t())
        return self.load(self.quantize(expert))

    def quantize(self, expert: FloatExpert) -> QuantizedExpert:
        """Equalized, as `quantize_expert` does."""
        from ..weights import QuantizedExpert

        number = equalizer(expert.w1, expert.v1)[:, 0]
        form, group = self.linear.form, self.linear.group
        w1, v1, w2 = expert.w1, expert.v1, expert.w2.t()
        to = room(form, group, tuple(w1.shape), tuple(v1.shape), tuple(w2.shape))
        return QuantizedExpert(
            quantize(form, group, w1, made=to[0]),
            quantize(form, group, v1, row_scale=1 / number, made=to[1]),
            quantize(form, group, w2, column_scale=number, made=to[2]),
        )

    def load(self, stored: Any) -> Packed:
        return self.linear.load(*stored)

    def stored(self, packed: Packed) -> QuantizedExpert | None:
        from ..weights import QuantizedExpert, QuantizedMatrix

        if self.quantization not in SCHEMES:
            return None
        return QuantizedExpert(*(QuantizedMatrix(*matrix.parts) for matrix in packed))

    def nbytes(self, hidden: int, d_model: int, itemsize: int) -> int:
        return 2 * self.linear.nbytes(hidden, d_model) + self.linear.nbytes(d_model, hidden)

    def stack(self, experts: Sequence[Packed]) -> Experts:
        return Experts([cast("tuple[Matrix, Matrix, Matrix] | tuple[()]", expert) for expert in experts])

    def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor, held: Experts) -> Tensor:
        return self._compute(held, x, expert_ids, router_weights).to(x.dtype)

    def prepare(self, x: Tensor) -> Prepared:
        return Prepared(x.dtype, x.float().contiguous())

    def run(self, prepared: Prepared, rows: Tensor | None, packed: Packed) -> Tensor:
        x = prepared.x if rows is None else prepared.x[rows]
        ids, ones = torch.zeros(len(x), 1, dtype=torch.int32), torch.ones(len(x), 1)
        return self._compute(self.stack([packed]), x, ids, ones).to(prepared.dtype)

    def each(self, x: Tensor, experts: Sequence[Packed]) -> Tensor:
        n = len(experts)
        ids, ones = torch.arange(n, dtype=torch.int32)[:, None], torch.ones(n, 1)
        return self._compute(self.stack(experts), x.expand(n, -1), ids, ones).to(x.dtype)

    def _compute(self, held: Experts, x: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
        """The weighted sum in float32 [n, d_model], in calls that Ctrl-C can come between."""
        x, ids, weights = x.float().contiguous(), expert_ids.int().contiguous(), router_weights.float().contiguous()
        (n, top_k), (w1, *_) = ids.shape, held.matrices[0]
        out = torch.zeros_like(x)
        compute, step = function("dbrx_experts"), max(1, CALL * len(held) // (3 * w1.outputs * w1.inputs * n * top_k))
        for first, last in ((at, min(at + step, end)) for begin, end in held.runs for at in range(begin, end, step)):
            chosen = held.array, len(held), first, last, self.activation
            compute(*chosen, x.data_ptr(), n, ids.data_ptr(), weights.data_ptr(), top_k, out.data_ptr(), out.data_ptr())
        return out
