"""3 bits a weight: 8 values for each group of inputs of an output, fitted to the group's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import QuantizedMatrix
from . import SCHEMES, affine

GROUP = SCHEMES["int3"].group  # inputs that share scale and zero point: 3.25 bits a weight all in


def quantize(weight: Tensor, group: int = GROUP, moments: Tensor | None = None) -> QuantizedMatrix:
    """Floats [outputs, inputs] -> values, scales and zero points of least squared error; the last group may be short.

    moments: of the inputs, as `affine.fit` takes them.
    """
    return affine.quantize("int3", pack, weight, group, moments)


def dequantize(matrix: QuantizedMatrix, group: int = GROUP) -> Tensor:
    """The float32 matrix [outputs, inputs] that is meant."""
    return affine.dequantize(unpack, matrix, group)


def pack(quantized: Tensor) -> Tensor:
    """Numbers 0 to 7, one a byte [outputs, inputs] -> as they are stored [outputs, inputs * 3 / 8].

    Two bits of all inputs come first, then the third bit of all; in a byte the first input has the lowest bits. The
    numbers 0 1 2 3 4 5 6 7 are three bytes: 0 1 2 3 and 0 1 2 3 in two bits each, 0 0 0 0 1 1 1 1 in one: E4 E4 F0.
    """
    return torch.cat((_pack(quantized & 3, 2), _pack(quantized >> 2, 1)), dim=1)


def unpack(values: Tensor) -> Tensor:
    """The way back."""
    low, third = values.tensor_split((values.shape[1] * 2 // 3,), dim=1)
    return _unpack(low, 2) | _unpack(third, 1) << 2


def _pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers of so many bits each [outputs, n] -> bytes [outputs, n * bits / 8]."""
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=numbers.device)
    found: Tensor = (numbers.reshape(len(numbers), -1, 8 // bits) << places).sum(-1, dtype=torch.uint8)
    return found


def _unpack(values: Tensor, bits: int) -> Tensor:
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device)
    return (values[..., None] >> places & (1 << bits) - 1).flatten(1)
