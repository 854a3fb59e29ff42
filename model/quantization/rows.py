"""Matrices as they are stored, an output's inputs one behind the other: what compiled functions read fastest.

A packed matrix is its tensors in a row, as `compiled.functions` take them; of several that are stacked, all of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..formats import QuantizedMatrix
from .floats import Floats
from .int8 import FINER, quantize, scale_rows, split
from .kernel import Packed, QuantizedFirst, RowByRow, Rows, not_finite


class FloatRows(Floats, RowByRow):
    """PyTorch's product with floats as they are."""

    way = "rows"

    def pack(self, *weights: Tensor) -> Packed:
        return tuple(weight.to(self.dtype, copy=True, memory_format=torch.contiguous_format) for weight in weights)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        return torch.cat([linear(x[0], weight) for weight in packed], dim=1)


class ByteRows(QuantizedFirst, RowByRow):
    """Bytes times bytes, summed in integers, by oneDNN (AVX-512 VNNI where there is).

    A row whose extreme stands far out has a second one with what rounding took away, as in `FbgemmKernel`.
    """

    name = "int8 rows"
    quantization = "int8"
    dtype = torch.float32

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        return quantize(weight)

    def load(self, *stored: QuantizedMatrix) -> Packed:
        if not all(bool(part.scale.isfinite().all()) for part in stored):
            raise not_finite()
        return tuple(tensor.clone() for part in stored for tensor in part[:2])

    def nbytes(self, outputs: int, inputs: int) -> int:
        return outputs * (inputs + 4)

    def prepare(self, x: Tensor) -> Rows:
        scaled, step, peaked = scale_rows(x)
        levels, rest = split(scaled)
        return levels.to(torch.int8), rest.round_().to(torch.int8), step, peaked

    def run(self, x: Rows, packed: Packed) -> Tensor:
        levels, rest, step, peaked = x
        n, second = len(levels), peaked.nonzero()[:, 0]
        rows = torch.cat((levels, rest.index_select(0, second))) if len(second) else levels
        found = []
        for values, scale in zip(packed[::2], packed[1::2], strict=True):
            out = torch._int_mm(rows, values.t()).float()
            if len(second):
                out = out[:n].index_add_(0, second, out[n:], alpha=1 / FINER)
            found.append(out.mul_(scale))
        return torch.cat(found, dim=1).mul_(step)
