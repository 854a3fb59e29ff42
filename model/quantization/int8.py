"""8 bits a weight: a scale for each output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import QuantizedMatrix

QMAX = 127  # values are -127 .. 127: symmetric, so that no zero point is needed
PIECE = 2**20  # weights that are quantized at once: the temporaries stay small


def quantize(weight: Tensor) -> QuantizedMatrix:
    """Floats [outputs, inputs] -> the nearest of 255 values between each output's largest magnitudes."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    rows = max(1, PIECE // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        floats = weight[part].float()
        scale[part] = floats.abs().amax(dim=1) / QMAX
        inverse = torch.where(scale[part] > 0, 1 / scale[part], 0)  # a row of zeros stays one
        values[part] = (floats * inverse[:, None]).round_()
    return QuantizedMatrix(values, scale)


def dequantize(matrix: QuantizedMatrix) -> Tensor:
    """The float32 matrix [outputs, inputs] that is meant."""
    return matrix.values.float() * matrix.scale[:, None]
