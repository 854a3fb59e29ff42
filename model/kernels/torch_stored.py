"""Experts in int8 that compute as their file holds them: to pack what is streamed takes longer than to read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..quantization import int8
from ..quantization.equalize import quantize_expert
from .base import OneByOne, Packed, check_scales
from .dispatch import Dispatched
from .upcast import linear

if TYPE_CHECKING:
    from ..weights import FloatExpert, QuantizedExpert

LANES = 32  # inputs that PyTorch's product of a row with bytes takes at a time; it does not look whether they divide


class StoredInt8Glu(Dispatched, OneByOne):
    """bfloat16 activations times bytes, then times each output's scale in float32. No byte is copied.

    FBGEMM's order of the same bytes takes about ten times as long to make as one product with them, and a streamed
    expert is often used once.
    """

    name = "int8 as stored"
    quantization = "int8"
    reads_stored = True

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.activation = activation

    def pack(self, expert: FloatExpert) -> Packed:
        return self.load(self.quantize(expert))

    def quantize(self, expert: FloatExpert) -> QuantizedExpert:
        return quantize_expert(expert, int8.quantize)

    def load(self, stored: QuantizedExpert) -> Packed:
        check_scales(stored)
        return tuple(matrix[:2] for matrix in stored)

    def nbytes(self, hidden: int, d_model: int, itemsize: int) -> int:
        return 3 * hidden * d_model + 4 * (2 * hidden + d_model)

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def run(self, prepared: Tensor, rows: Tensor | None, packed: Packed) -> Tensor:
        x = (prepared if rows is None else prepared[rows]).bfloat16()
        w1, v1, w2 = packed
        hidden = self.activation(_product(x, *w1)) * _product(x, *v1)
        return _product(hidden.bfloat16(), *w2).to(prepared.dtype)


def _product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """x [n, inputs] bfloat16, values int8 [outputs, inputs], scale float32 [outputs] -> float32 [n, outputs]."""
    # For several rows this product expects bytes that are aligned, and ends the process where they are not.
    if len(x) == 1 and values.shape[1] % LANES == 0:
        out = torch._weight_int8pack_mm(x, values, torch.ones(len(values), dtype=x.dtype))
    else:
        out = linear(x, values)
    return out.float() * scale
