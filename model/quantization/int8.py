"""8 bits a weight: a scale for each output; activations in 8 bits too where the kernel wants them, a range a token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import QuantizedMatrix
from .kernel import Packed, QuantizedFirst, RowByRow, Rows, check_scales, paired

LEVELS = 127  # -127 .. 127: symmetric, so that no zero point is needed
SUMMED = 63  # levels of activations where sums of two products have 16 bits: 127 x 127, twice, still fits
PEAK = 6.0  # times its root mean square: a row's extreme farther out makes it peaked; a normal distribution's is 3 to 4
INNER_PEAK = 10.0  # the same inside an expert, where activations are products of two, and nearly all rows have extremes
ROUNDING = 1.5 * 2**23  # added and taken away, it rounds float32 as `round` does, in a third of the time
PIECE = 2**20  # weights that are quantized at once: the temporaries stay small


def quantize(weight: Tensor) -> QuantizedMatrix:
    """Floats [outputs, inputs] -> the nearest of 255 levels between each output's largest magnitudes."""
    values = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight))
    rows = max(1, PIECE // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        floats = weight[part].float()
        scale[part] = floats.abs().amax(dim=1) / LEVELS
        inverse = torch.where(scale[part] > 0, 1 / scale[part], 0)  # a row of zeros stays one
        values[part] = (floats * inverse[:, None]).round_()
    return QuantizedMatrix(values, scale)


def dequantize(matrix: QuantizedMatrix) -> Tensor:
    """The float32 matrix [outputs, inputs] that is meant."""
    return matrix.values.float() * matrix.scale[:, None]


def _stack(parts: tuple[QuantizedMatrix, ...]) -> QuantizedMatrix:
    """One below the other, checked."""
    check_scales(parts)
    if len(parts) == 1:
        return parts[0]
    return QuantizedMatrix(torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts]))


class Int8(QuantizedFirst):
    """What kernels of bytes share."""

    quantization = "int8"
    dtype = torch.float32

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        return quantize(weight)

    def nbytes(self, outputs: int, inputs: int) -> int:
        return outputs * (inputs + 4)


class FbgemmKernel(Int8):
    """FBGEMM's product of bytes (AVX-512 VNNI where there is), which PyTorch carries on x86.

    It knows one range for all rows, so each row is scaled to fill its levels before, and back after: a row's result
    does not depend on its neighbours. A row whose extreme stands far out, so that the levels are too few for the rest
    of it, is given a second row with what rounding took away. A lone row always is: the matrix is read once for both.

    levels: of activations, to each side of zero. Without VNNI, FBGEMM adds two products in 16 bits, for which `SUMMED`
    are not too many, but too few for any row: each has a second one there.
    """

    def __init__(self, levels: int = LEVELS) -> None:
        self.levels = levels
        self.name = "int8 fbgemm" if levels == LEVELS else "int8 fbgemm 7-bit"

    def load(self, *stored: QuantizedMatrix) -> Packed:
        values, scale, _ = _stack(stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are deprecated; here they only carry the weights over
            zeros = torch.zeros(len(scale), dtype=torch.long)
            weight = torch._make_per_channel_quantized_tensor(values, scale.double(), zeros, 0)
        del values  # copied: not twice while the next copy is made
        torch.backends.quantized.engine = "fbgemm"
        return (torch.ops.quantized.linear_prepack(weight, None),)

    def nbytes(self, outputs: int, inputs: int) -> int:
        return outputs * (inputs + 12)

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        scaled, step, peaked = scale_rows(x, self.levels, inner)
        return scaled, step, peaked | (self.levels < LEVELS)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        scaled, step, peaked = x
        n, second = len(scaled), peaked.nonzero()[:, 0]
        if len(second):
            rounded, rest = split(scaled[second], self.levels)
            scaled = torch.cat((scaled.index_copy(0, second, rounded), rest))
        out = self._product(scaled, packed[0])
        if len(second):
            out = out[:n].index_add_(0, second, out[n:], alpha=1 / finer(self.levels))
        return out.mul_(step)

    def each(self, x: Tensor, matrices: Sequence[Packed]) -> Tensor:
        step = _step(x, self.levels)
        rows = torch.stack(split(x / step, self.levels), dim=1).unbind()
        out = [self._product(row, matrix) for row, (matrix,) in paired(rows, matrices)]
        both = torch.stack(out) if len(out) > 1 else out[0][None]
        return torch.add(both[:, 0], both[:, 1], alpha=1 / finer(self.levels)).mul_(step)

    def _product(self, scaled: Tensor, matrix: Any) -> Tensor:
        """Rows of levels, rounded, times a packed matrix, in float32."""
        zero = self.levels + 1
        out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(scaled, 1.0, zero, matrix)
        return out


def _step(x: Tensor, levels: int) -> Tensor:
    """The distance of two levels in each row [n, 1], so that they reach its extremes."""
    return x.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(levels)


def scale_rows(x: Tensor, levels: int, inner: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, inputs] in units of their levels; the distance of these [n, 1]; which rows are peaked [n]."""
    step = _step(x, levels)
    spread = (INNER_PEAK if inner else PEAK) * (x.shape[1] ** -0.5) * torch.linalg.vector_norm(x, dim=1)
    return x / step, step, spread < levels * step[:, 0]


def finer(levels: int) -> int:
    """Levels of a second row in one of the first."""
    return 2 * levels


def nearest(scaled: Tensor) -> Tensor:
    """Rows in units of their levels -> the nearest of these."""
    return (scaled + ROUNDING).sub_(ROUNDING)


def split(scaled: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The nearest levels, and what that takes away, in levels of its own."""
    rounded = nearest(scaled)
    return rounded, (scaled - rounded).mul_(finer(levels))


class AtenKernel(Int8, RowByRow):
    """Bytes for the weights only; runs everywhere."""

    name = "int8 aten"

    def load(self, *stored: QuantizedMatrix) -> Packed:
        values, scale, _ = _stack(stored)
        return values.clone() if len(stored) == 1 else values, scale.clone() if len(stored) == 1 else scale

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        return (x,)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        out: Tensor = torch._weight_int8pack_mm(x[0], *packed)
        return out
