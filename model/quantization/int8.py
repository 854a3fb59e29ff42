"""8 bits a weight: a scale for each output; activations in 8 bits too where the kernel wants them, a range a token."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..formats import QuantizedMatrix
from .kernel import Packed, Rows, not_finite

LEVELS = 127  # -127 .. 127: symmetric, so that no zero point is needed
PEAK = 12.0  # a normal distribution's is 6 to 8
FINER = 254  # levels of the second row in one of the first
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
    if len(parts) == 1:
        return parts[0]
    return QuantizedMatrix(torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts]))


class FbgemmKernel:
    """FBGEMM's product of bytes (AVX-512 VNNI where there is), which PyTorch carries on x86.

    It reads memory at its full speed for one row, where it also quantizes the activations by itself. For several rows
    it knows only one range for all of them, so each row is scaled and shifted to fill the range -128 .. 127 before,
    and back after: a row's result does not depend on its neighbours. A row whose extremes stand far out, so that 256
    levels are too few for the rest of it, is given a second row with what rounding took away.
    """

    name = "int8 fbgemm"
    quantization = "int8"
    dtype = torch.float32

    def __init__(self, peak: float = PEAK) -> None:
        """peak: a row whose range is more than so many times its root mean square gets a second row; 0: every row."""
        self.peak = peak

    def pack(self, *weights: Tensor) -> Packed:
        return self.load(*map(quantize, weights))

    def load(self, *stored: QuantizedMatrix) -> Packed:
        values, scale, _ = _stack(stored)
        if not bool(scale.isfinite().all()):
            raise not_finite()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are deprecated; here they only carry the weights over
            zeros = torch.zeros(len(scale), dtype=torch.long)
            weight = torch._make_per_channel_quantized_tensor(values, scale.double(), zeros, 0)
        torch.backends.quantized.engine = "fbgemm"
        sums = values.sum(dim=1, dtype=torch.int32) * scale
        return torch.ops.quantized.linear_prepack(weight, None), sums

    def nbytes(self, outputs: int, inputs: int) -> int:
        return outputs * (inputs + 16)

    def prepare(self, x: Tensor) -> Rows:
        low, high = x.aminmax(dim=1, keepdim=True)
        spread = high - low
        peaked = spread > self.peak * (x.shape[1] ** -0.5) * torch.linalg.vector_norm(x, dim=1, keepdim=True)
        if len(x) == 1 and not bool(peaked):
            return (x,)
        low, high = low.clamp(max=0), high.clamp(min=0)
        step = ((high - low) / 255).clamp(min=1e-30)
        shift = (-low / step).round() - 128
        return x / step + shift, step, shift * step, peaked

    def run(self, x: Rows, packed: Packed) -> Tensor:
        matrix, sums = packed
        if len(x) == 1:
            out: Tensor = torch.ops.quantized.linear_dynamic(x[0], matrix)
            return out
        scaled, step, offset, peaked = x
        n, second = len(scaled), peaked[:, 0].nonzero()[:, 0]
        if len(second):
            rest = scaled[second]
            rest = (rest - rest.round().clamp_(-128, 127)) * FINER
            scaled = torch.cat((scaled, rest))
        out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(scaled, 1.0, 128, matrix)
        if len(second):
            out = out[:n].index_add_(0, second, out[n:], alpha=1 / FINER)
        return out.mul_(step).addr_(offset[:, 0], sums, alpha=-1)


class AtenKernel:
    """Bytes for the weights only; runs everywhere."""

    name = "int8 aten"
    quantization = "int8"
    dtype = torch.float32

    def pack(self, *weights: Tensor) -> Packed:
        return self.load(*map(quantize, weights))

    def load(self, *stored: QuantizedMatrix) -> Packed:
        values, scale, _ = _stack(stored)
        if not bool(scale.isfinite().all()):
            raise not_finite()
        return values.clone() if len(stored) == 1 else values, scale.clone() if len(stored) == 1 else scale

    def nbytes(self, outputs: int, inputs: int) -> int:
        return outputs * (inputs + 4)

    def prepare(self, x: Tensor) -> Rows:
        return (x,)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        out: Tensor = torch._weight_int8pack_mm(x[0], *packed)
        return out
