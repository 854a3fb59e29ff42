"""Few bits a weight with scale and offset for each group of inputs, as MLX, GPTQ and AWQ mean them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..weights import GroupMatrix
from . import int4
from .affine import spread


def unpack(values: Tensor, bits: int) -> Tensor:
    """Bytes [outputs, inputs * bits / 8] -> int32 [outputs, inputs], bit by bit, the first in the lowest bits."""
    start = torch.arange(0, values.shape[1] * 8 // bits * bits, bits, device=values.device)
    wide = pad(values, (0, 1)).int()  # a number lies in two bytes at most
    two: Tensor = wide[:, start // 8] | wide[:, start // 8 + 1] << 8
    return (two >> (start % 8).int()) & (1 << bits) - 1


def quantize(weight: Tensor, group: int = 64) -> GroupMatrix:
    """Floats [outputs, inputs] -> 4 bits between the extremes of each group, with an offset; inputs in whole groups."""
    grouped = weight.float().reshape(len(weight), -1, group)
    low, high = grouped.amin(-1).bfloat16(), grouped.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
    quantized = ((grouped - low[..., None]) / scale[..., None]).round_().clamp_(0, 15).byte().flatten(1)
    return GroupMatrix(int4.pack(quantized), scale, low, 4, group)


def dequantize(matrix: GroupMatrix) -> Tensor:
    """The float32 matrix [outputs, inputs] that is meant."""
    quantized = unpack(matrix.values, matrix.bits)
    scale, offset = (spread(part, matrix.group, quantized.shape[1]) for part in (matrix.scale, matrix.offset))
    return (quantized - offset) * scale if matrix.zero_points else quantized * scale + offset
