"""Matrices as they are stored, an output's inputs one behind the other: what compiled functions read fastest.

A packed matrix is its tensors in a row, as `compiled.functions` take them; of several that are stacked, all of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import QuantizedMatrix
from .floats import Floats
from .int8 import LEVELS, Int8, finer, nearest, scale_rows, split
from .kernel import Packed, RowByRow, Rows, check_scales
from .widened import linear, widens


class FloatRows(Floats, RowByRow):
    """PyTorch's product with floats as they are; of many rows in float32 where the processor has none for bfloat16."""

    way = "rows"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        if widens(dtype, torch.device("cpu")):
            self.name += " widened"

    def pack(self, *weights: Tensor) -> Packed:
        return tuple(weight.to(self.dtype, copy=True, memory_format=torch.contiguous_format) for weight in weights)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        return linear(x[0], *packed)


class ByteRows(Int8, RowByRow):
    """Bytes for the weights only: (values [outputs, inputs], scale [outputs]) for each matrix. Runs everywhere."""

    name = "int8 rows widened"

    def load(self, *stored: QuantizedMatrix) -> Packed:
        check_scales(stored)
        return tuple(tensor.clone() for part in stored for tensor in part[:2])

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        return (x,)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        return linear(x[0], *packed[::2]).mul_(torch.cat(packed[1::2]))


class OneDnnByteRows(ByteRows):
    """Bytes times bytes, summed in integers, by oneDNN (AVX-512 VNNI where there is).

    A row whose extreme stands far out has a second one with what rounding took away, as in `FbgemmKernel`.
    """

    name = "int8 rows"

    def load(self, *stored: QuantizedMatrix) -> Packed:
        if not multiplies_bytes():
            raise NotImplementedError("no fast product of bytes on this CPU")
        return super().load(*stored)

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        scaled, step, peaked = scale_rows(x, LEVELS, inner)
        rest = torch.empty_like(scaled, dtype=torch.int8)  # of peaked rows; the others' is never read
        if len(second := peaked.nonzero()[:, 0]):
            rest.index_copy_(0, second, split(scaled[second], LEVELS)[1].round_().to(torch.int8))
        return nearest(scaled).to(torch.int8), rest, step, peaked

    def run(self, x: Rows, packed: Packed) -> Tensor:
        rows, rest, step, peaked = x
        n, second = len(rows), peaked.nonzero()[:, 0]
        if len(second):
            rows = torch.cat((rows, rest.index_select(0, second)))
        values, scales = packed[::2], packed[1::2]
        out = torch.empty(len(rows), sum(map(len, scales)))
        parts = torch.split(out, list(map(len, scales)), dim=1)
        for part, matrix, scale in zip(parts, values, scales, strict=True):
            torch.mul(torch._int_mm(rows, matrix.t()), scale, out=part)
        if len(second):
            out = out[:n].index_add_(0, second, out[n:], alpha=1 / finer(LEVELS))
        return out.mul_(step)


def multiplies_bytes() -> bool:
    """Whether oneDNN multiplies bytes here; PyTorch's own loop is right too, and a hundred times slower."""
    return torch.cpu._is_vnni_supported()
