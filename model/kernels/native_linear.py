"""Products of the native library: weights as they lie in memory or in a mapped file, activations in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native.abi import Matrix
from ..quantization import SCHEMES
from ..weights import QuantizedMatrix
from .base import CPU, Packed, Rows, check_scales, paired
from .native_call import CALL, float_matrix, function, quantize, quantized_matrix


class NativeProducts:
    """Products with packed matrices: a `Matrix` for each that was given."""

    dtype = torch.float32
    keeps_nan = True
    device = CPU
    reads_stored = True  # `load` copies nothing

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        return (x.float().contiguous(),)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        products = [_product(x[0], each) for each in packed]
        return torch.cat(products, dim=1) if len(products) > 1 else products[0]

    def each(self, x: Tensor, matrices: Sequence[Packed]) -> Tensor:
        (rows,) = self.prepare(x)
        if len(matrices) == 1:
            return self.run((rows,), matrices[0])
        return torch.cat([self.run((row,), packed) for row, packed in paired(torch.split(rows, 1), matrices)])


class NativeLinear(NativeProducts):
    """A matrix of float32 or bfloat16, or in one of `SCHEMES`."""

    def __init__(self, form: str, group: int = 0) -> None:
        self.form = form
        self.quantization = form if form in SCHEMES else "none"
        self.group = group or (SCHEMES[form].group if form in SCHEMES else 0)
        self.name = f"{form} native"

    def pack(self, *weights: Tensor) -> Packed:
        if self.quantization == "none":
            return tuple(float_matrix(weight.to(getattr(torch, self.form))) for weight in weights)
        return self.load(*map(self.quantize, weights))

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        if self.quantization == "none":
            raise ValueError("floats are not quantized")
        return quantize(self.form, self.group, weight)

    def load(self, *stored: QuantizedMatrix) -> Packed:
        """As they are stored."""
        check_scales(stored)
        return tuple(quantized_matrix(self.form, self.group, each) for each in stored)

    def nbytes(self, outputs: int, inputs: int) -> int:
        if self.quantization == "none":
            return int(getattr(torch, self.form).itemsize) * outputs * inputs
        return SCHEMES[self.form].nbytes(self.group, outputs, inputs)


def _product(x: Tensor, matrix: Matrix) -> Tensor:
    """x [n, inputs] -> [n, outputs], in calls that Ctrl-C can come between."""
    linear, n = function("dbrx_linear"), len(x)
    out, step = torch.empty(n, matrix.outputs), max(64, CALL // (matrix.outputs * matrix.inputs))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        linear(matrix, x[rows].data_ptr(), rows.stop - start, out[rows].data_ptr())
    return out
