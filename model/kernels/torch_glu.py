"""Experts by PyTorch: as floats lie in the files, or by any kernel for matrices: gate and up at once, then down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..quantization.equalize import quantize_expert
from .base import LinearKernel, OneByOne, Packed, Rows
from .dispatch import Dispatched
from .upcast import linear, matmul

if TYPE_CHECKING:
    from ..weights import FloatExpert, QuantizedExpert


class FloatGlu(Dispatched, OneByOne):
    """Plain products in the weights' own type, on any device; in float32 where the processor has none for that type."""

    name = "float"
    quantization = "none"
    reads_stored = True

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.activation = activation

    def pack(self, expert: FloatExpert) -> Packed:
        return tuple(expert)

    def quantize(self, expert: FloatExpert) -> NoReturn:
        raise ValueError("a kernel of floats quantizes no expert")

    def load(self, stored: Any) -> NoReturn:
        raise ValueError("a kernel of floats loads no quantized expert")

    def nbytes(self, hidden: int, d_model: int, itemsize: int) -> int:
        return 3 * hidden * d_model * itemsize

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def run(self, prepared: Tensor, rows: Tensor | None, packed: Packed) -> Tensor:
        w1, v1, w2 = packed
        x = prepared if rows is None else prepared[rows]
        return matmul(self.activation(linear(x, w1)) * linear(x, v1), w2)


class Prepared(NamedTuple):
    """A layer's input: in which dtype, and as the matrices want it."""

    dtype: torch.dtype
    rows: Rows


class LinearsGlu(Dispatched):
    """An expert as two packed matrices: w1 above v1, and w2 by its outputs."""

    reads_stored = False

    def __init__(self, matrices: LinearKernel, activation: Callable[[Tensor], Tensor]) -> None:
        self.matrices = matrices
        self.activation = activation
        self.name = matrices.name
        self.quantization = matrices.quantization

    def pack(self, expert: FloatExpert) -> Packed:
        if self.quantization != "none":
            return self.load(self.quantize(expert))
        return self.matrices.pack(*expert[:2]), self.matrices.pack(expert.w2.t().contiguous())

    def quantize(self, expert: FloatExpert) -> QuantizedExpert:
        return quantize_expert(expert, self.matrices.quantize)

    def load(self, stored: QuantizedExpert) -> Packed:
        return self.matrices.load(stored.w1, stored.v1), self.matrices.load(stored.w2)

    def nbytes(self, hidden: int, d_model: int, itemsize: int) -> int:
        return self.matrices.nbytes(2 * hidden, d_model) + self.matrices.nbytes(d_model, hidden)

    def prepare(self, x: Tensor) -> Prepared:
        return Prepared(x.dtype, self.matrices.prepare(x))

    def run(self, prepared: Prepared, rows: Tensor | None, packed: Packed) -> Tensor:
        dtype, x = prepared
        if rows is not None:
            x = tuple(part.index_select(0, rows) for part in x)
        gate, up = self.matrices.run(x, packed[0]).chunk(2, dim=-1)
        hidden = self.activation(gate).mul_(up)
        return self.matrices.run(self.matrices.prepare(hidden, inner=True), packed[1]).to(dtype)

    def each(self, x: Tensor, experts: Sequence[Packed]) -> Tensor:
        gate, up = self.matrices.each(x, [first for first, _ in experts]).chunk(2, dim=-1)
        hidden = self.activation(gate).mul_(up)
        return self.matrices.each(hidden, [second for _, second in experts]).to(x.dtype)
