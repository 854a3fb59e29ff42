"""int8 weights by PyTorch: FBGEMM's product of bytes, or aten's with bytes for the weights only."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..quantization.int8 import QMAX, quantize
from ..weights import QuantizedMatrix
from .base import Packed, QuantizedFirst, RowByRow, Rows, check_scales, paired

SUMMED_QMAX = 63  # of activations where sums of two products have 16 bits: 127 x 127, twice, still fits
OUTLIER = (
    6.0  # times its root mean square: a row's extreme farther out is an outlier; a normal distribution's is 3 to 4
)
INNER_OUTLIER = 10.0  # the same inside an expert, where activations are products of two, and nearly all rows have some
ROUNDING = 1.5 * 2**23  # added and taken away, it rounds float32 as `round` does, in a third of the time


def _stack(parts: tuple[QuantizedMatrix, ...]) -> QuantizedMatrix:
    """One below the other, checked."""
    check_scales(parts)
    if len(parts) == 1:
        return parts[0]
    return QuantizedMatrix(torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts]))


class Int8(QuantizedFirst):
    """What kernels of bytes share."""

    quantization = "int8"
    group = 0
    dtype = torch.float32

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        return quantize(weight)

    def nbytes(self, outputs: int, inputs: int) -> int:
        return outputs * (inputs + 4)


class FbgemmKernel(Int8):
    """FBGEMM's product of bytes (AVX-512 VNNI where there is), which PyTorch carries on x86.

    It knows one range for all rows, so each row is divided by a scale of its own before, and multiplied by it after: a
    row's result does not depend on its neighbours. A row with an outlier, beside which too few values are left for
    the rest of it, is given a residual row with what rounding took away. A single row always is: the matrix is read
    once for both.

    qmax: of activations. Without VNNI, FBGEMM adds two products in 16 bits, for which `SUMMED_QMAX` is not too much,
    but too little for any row: each has a residual there.
    """

    def __init__(self, qmax: int = QMAX) -> None:
        self.qmax = qmax
        self.name = "int8 fbgemm" if qmax == QMAX else "int8 fbgemm 7-bit"

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
        scaled, scale, has_outlier = _scale_rows(x, self.qmax, inner)
        return scaled, scale, has_outlier | (self.qmax < QMAX)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        scaled, scale, has_residual = x
        n, second = len(scaled), has_residual.nonzero()[:, 0]
        if len(second):
            rounded, residual = _with_residual(scaled[second], self.qmax)
            scaled = torch.cat((scaled.index_copy(0, second, rounded), residual))
        out = self._product(scaled, packed[0])
        if len(second):
            out = out[:n].index_add_(0, second, out[n:], alpha=1 / _residual_scale(self.qmax))
        return out.mul_(scale)

    def each(self, x: Tensor, matrices: Sequence[Packed]) -> Tensor:
        scale = _scale(x, self.qmax)
        rows = torch.stack(_with_residual(x / scale, self.qmax), dim=1).unbind()
        out = [self._product(row, matrix) for row, (matrix,) in paired(rows, matrices)]
        both = torch.stack(out) if len(out) > 1 else out[0][None]
        return torch.add(both[:, 0], both[:, 1], alpha=1 / _residual_scale(self.qmax)).mul_(scale)

    def _product(self, scaled: Tensor, matrix: Any) -> Tensor:
        """Rows in units of their scale, rounded, times a packed matrix, in float32."""
        zero = self.qmax + 1
        out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(scaled, 1.0, zero, matrix)
        return out


def _scale(x: Tensor, qmax: int) -> Tensor:
    """Of each row [n, 1], such that its extreme becomes qmax."""
    return x.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(qmax)


def _scale_rows(x: Tensor, qmax: int, inner: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, inputs] in units of their scale; the scale [n, 1]; which rows have an outlier [n]."""
    scale = _scale(x, qmax)
    spread = (INNER_OUTLIER if inner else OUTLIER) * (x.shape[1] ** -0.5) * torch.linalg.vector_norm(x, dim=1)
    return x / scale, scale, spread < qmax * scale[:, 0]


def _residual_scale(qmax: int) -> int:
    """How many units of a residual row make one of its row."""
    return 2 * qmax


def _with_residual(scaled: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Rows rounded, and what that takes away, in units of its own."""
    rounded = (scaled + ROUNDING).sub_(ROUNDING)
    return rounded, (scaled - rounded).mul_(_residual_scale(qmax))


class AtenInt8(Int8, RowByRow):
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
