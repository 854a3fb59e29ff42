"""4 bits a weight: 16 values for each group of inputs of an output, fitted to the group's weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..weights import QuantizedMatrix
from . import is_finite, not_finite

QMAX = 15
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
    if not is_finite(padded):
        raise not_finite()
    rows = torch.split(padded.view(outputs, -1, group), max(1, PIECE // inputs))
    # Made anew for each step, it took four fifths of the time.
    scratch = torch.empty(3, *rows[0].shape, device=weight.device)
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
        scale = ((high - low) * share / QMAX).clamp(min=1e-12)
        base = (low + high) / 2 - scale * QMAX / 2
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
    levels = torch.div(w, scale, out=q).add_(zero).round_().clamp_(0, QMAX).to(torch.uint8)
    return levels, scale[..., 0], zero[..., 0]


def _nearest(w: Tensor, scale: Tensor, base: Tensor, out: Tensor) -> Tensor:
    """The levels whose scale * level + base is nearest to w."""
    return torch.sub(w, base, out=out).div_(scale).round_().clamp_(0, QMAX)
