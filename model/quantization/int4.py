"""4 bits a weight: 16 values for each group of inputs of an output, fitted to the group's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import QuantizedMatrix
from . import SCHEMES, affine

GROUP = SCHEMES["int4"].group  # inputs that share scale and zero point; 128 take 0.09 GB where 32 take 0.1, err more


def quantize(weight: Tensor, group: int = GROUP, moments: Tensor | None = None) -> QuantizedMatrix:
    """Floats [outputs, inputs] -> values, scales and zero points of least squared error; the last group may be short.

    moments: of the inputs, as `affine.fit` takes them.
    """
    return affine.quantize("int4", pack, weight, group, moments)


def dequantize(matrix: QuantizedMatrix, group: int = GROUP) -> Tensor:
    """The float32 matrix [outputs, inputs] that is meant."""
    return affine.dequantize(unpack, matrix, group)


def pack(quantized: Tensor) -> Tensor:
    """Numbers 0 to 15, one a byte [outputs, inputs] -> two a byte [outputs, inputs / 2]."""
    return quantized[:, 0::2] | quantized[:, 1::2] << 4


def unpack(values: Tensor) -> Tensor:
    """The way back."""
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(1)
