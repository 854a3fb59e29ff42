"""4 bits a weight: 16 levels for each group of inputs of an output, fitted to the group's weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..formats import QuantizedMatrix
from .kernel import Packed, QuantizedFirst, RowByRow, Rows, check_scales, not_finite

LEVELS = 15
GROUP = 32  # inputs that share scale and zero point; 128 takes 0.09 GB where 32 take 0.1, and errs more
FIRST_RANGES = (1.0, 0.9, 0.8, 0.7)  # of a group's own range: where the fit begins; it goes on from the best
ROUNDS = 8
PIECE = 2**18  # weights that are fitted at once: the temporaries stay small


def quantize(weight: Tensor, group: int = GROUP) -> QuantizedMatrix:
    """Floats [outputs, inputs] -> levels, scales and zero points of least squared error; the last group may be short.

    Levels and range are improved in turn: the nearest levels for a range, then the range of least squares for these
    levels. Plain rounding between minimum and maximum errs a fifth more.
    """
    outputs, inputs = weight.shape
    if inputs % 2:
        raise ValueError(f"int4 puts two inputs into a byte, and {inputs} is odd")
    padded = pad(weight.float()[None], (0, -inputs % group), mode="replicate")[0]
    if not all(bound.isfinite() for bound in padded.aminmax()):
        raise not_finite()
    rows = torch.split(padded.view(outputs, -1, group), max(1, PIECE // inputs))
    scratch = torch.empty(3, *rows[0].shape)  # made anew for each step, it took four fifths of the time
    fitted = (_fit(part, *scratch[:, : len(part)]) for part in rows)
    levels, scale, zero = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    levels = levels.view(outputs, -1)[:, :inputs]
    return QuantizedMatrix(levels[:, 0::2] | levels[:, 1::2] << 4, scale, zero)


def dequantize(matrix: QuantizedMatrix, group: int = GROUP) -> Tensor:
    """The float32 matrix [outputs, inputs] that is meant."""
    assert matrix.zero is not None
    levels = unpack(matrix.values)
    parts = (matrix.scale, matrix.zero)
    scale, zero = (part.float().repeat_interleave(group, dim=1)[:, : levels.shape[1]] for part in parts)
    return (levels - zero) * scale


def unpack(values: Tensor) -> Tensor:
    """Two levels a byte [outputs, inputs / 2] -> one a byte [outputs, inputs]."""
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(1)


def _fit(w: Tensor, q: Tensor, centred: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups [rows, groups, group] -> levels uint8 of that shape, scale and zero [rows, groups].

    q, centred, product: like w, written over.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_base = torch.ones_like(low), low.clone()
    mean = w.mean(-1, keepdim=True)
    for share in FIRST_RANGES:
        scale = ((high - low) * share / LEVELS).clamp(min=1e-12)
        base = (low + high) / 2 - scale * LEVELS / 2
        for _ in range(ROUNDS):
            middle = _nearest(w, scale, base, q).mean(-1, keepdim=True)
            torch.sub(q, middle, out=centred)
            covariance = torch.mul(centred, w, out=product).sum(-1, keepdim=True)
            scale = covariance / centred.square_().sum(-1, keepdim=True).clamp(min=1e-12)
            scale = scale.clamp(min=1e-12)
            base = mean - scale * middle
        error = _nearest(w, scale, base, q).mul_(scale).add_(base).sub_(w).square_().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_base = torch.where(better, scale, best_scale), torch.where(better, base, best_base)
    # Kept in bfloat16: the levels are the nearest for what is kept.
    scale = best_scale.bfloat16()
    zero = (-best_base / scale).bfloat16()
    levels = torch.div(w, scale, out=q).add_(zero).round_().clamp_(0, LEVELS).to(torch.uint8)
    return levels, scale[..., 0], zero[..., 0]


def _nearest(w: Tensor, scale: Tensor, base: Tensor, out: Tensor) -> Tensor:
    """The levels whose scale * level + base is nearest to w."""
    return torch.sub(w, base, out=out).div_(scale).round_().clamp_(0, LEVELS)


class Int4(QuantizedFirst):
    """What kernels for such matrices share. group: inputs that share scale and zero point."""

    quantization = "int4"

    def __init__(self, group: int = GROUP) -> None:
        self.group = group

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        return quantize(weight, self.group)

    def nbytes(self, outputs: int, inputs: int) -> int:
        groups = -(-inputs // self.group)
        return outputs * groups * (self.group // 2 + 4)


class AtenKernel(Int4, RowByRow):
    """PyTorch's own product with 4-bit weights, in bfloat16."""

    name = "int4 aten"
    dtype = torch.bfloat16

    def load(self, *stored: QuantizedMatrix) -> Packed:
        levels = torch.cat([unpack(part.values) for part in stored]).int()
        levels = pad(levels, (0, -levels.shape[1] % self.group))
        check_scales(stored)
        matrix = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        scale = torch.cat([part.scale for part in stored]).float()
        zero = torch.cat([part.zero for part in stored if part.zero is not None]).float()
        # The kernel computes (level - 8) * scale + base.
        ranges = torch.stack((scale, (8 - zero) * scale), dim=-1)
        return matrix, ranges.transpose(0, 1).to(torch.bfloat16).contiguous()

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        x = x.to(torch.bfloat16)
        return (pad(x, (0, -x.shape[1] % self.group)) if x.shape[1] % self.group else x,)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x[0], packed[0], self.group, packed[1])
        return out


class PlainKernel(Int4, RowByRow):
    """Floats again at each product: slow, for shapes and processors that nothing else is made for."""

    name = "int4 plain"
    dtype = torch.float32

    def load(self, *stored: QuantizedMatrix) -> Packed:
        check_scales(stored)
        return tuple(QuantizedMatrix(*(part.clone() for part in matrix if part is not None)) for matrix in stored)

    def nbytes(self, outputs: int, inputs: int) -> int:
        groups = -(-inputs // self.group)
        return outputs * (inputs // 2 + 4 * groups)

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        return (x.float(),)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        return torch.cat([linear(x[0], dequantize(matrix, self.group)) for matrix in packed], dim=1)
