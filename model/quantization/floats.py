"""Floats as they are, reordered for oneDNN: no bit of a weight is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import QuantizedMatrix
from .kernel import Packed, Rows, paired

# oneDNN reads memory up to a third faster for four rows than for one with AVX-512, and without it up to a half slower.
ROWS = 4 if torch.cpu._is_avx512_supported() else 1


class Floats:
    """What kernels of floats share: nothing is quantized, neither weights nor activations."""

    quantization = "none"
    way: str  # how they are held, in a word

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = f"{str(dtype).removeprefix('torch.')} {self.way}"

    def quantize(self, weight: Tensor) -> NoReturn:
        raise ValueError("floats are not quantized")

    def load(self, *stored: QuantizedMatrix) -> NoReturn:
        raise ValueError("floats are not stored quantized")

    def nbytes(self, outputs: int, inputs: int) -> int:
        return self.dtype.itemsize * outputs * inputs

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        return (x,)


class OneDnnKernel(Floats):
    """oneDNN's product with weights in its own blocked order (in bfloat16 with AVX-512 BF16 where there is)."""

    way = "onednn"

    def pack(self, *weights: Tensor) -> Packed:
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        return (torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype).contiguous(), ROWS),)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        return multiply(x[0], packed[0])

    def each(self, x: Tensor, matrices: Sequence[Packed]) -> Tensor:
        rows = (pad(x[:, None], (0, 0, 0, ROWS - 1)) if ROWS > 1 else x[:, None]).unbind()
        return torch.cat([self.run((row,), packed)[:1] for row, packed in paired(rows, matrices)])


def multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """x [n, inputs], and a matrix [outputs, inputs] in oneDNN's own order -> [n, outputs] like x."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
    return out
