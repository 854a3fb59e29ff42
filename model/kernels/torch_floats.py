"""Floats by PyTorch, as they are: no bit of a weight is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..weights import QuantizedMatrix
from .base import CPU, Packed, RowByRow, Rows, paired
from .upcast import linear, upcasts

# oneDNN reads memory up to a third faster for four rows than for one with AVX-512, and without it up to a half slower.
ROWS = 4 if torch.cpu._is_avx512_supported() else 1


class Floats:
    """What kernels of floats share: nothing is quantized, neither weights nor activations."""

    quantization = "none"
    keeps_nan = True
    device = CPU
    group = 0
    order: str  # in which they are held, in a word

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = f"{str(dtype).removeprefix('torch.')} {self.order}"

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

    order = "onednn"

    def pack(self, *weights: Tensor) -> Packed:
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        return (torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype).contiguous(), ROWS),)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x[0], packed[0], None, "none", [], "")
        return out

    def each(self, x: Tensor, matrices: Sequence[Packed]) -> Tensor:
        rows = (pad(x[:, None], (0, 0, 0, ROWS - 1)) if ROWS > 1 else x[:, None]).unbind()
        return torch.cat([self.run((row,), packed)[:1] for row, packed in paired(rows, matrices)])


class RowMajorKernel(Floats, RowByRow):
    """PyTorch's product with floats row by row; of many rows in float32 where the processor has none for bfloat16."""

    order = "rows"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        if upcasts(dtype, torch.device("cpu")):
            self.name += " upcast"

    def pack(self, *weights: Tensor) -> Packed:
        return tuple(weight.to(self.dtype, copy=True, memory_format=torch.contiguous_format) for weight in weights)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        return linear(x[0], *packed)
