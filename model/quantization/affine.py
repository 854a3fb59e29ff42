"""Affine quantization, a scale and a zero point for each group of inputs of an output: how int4 and int3 are fitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..weights import QuantizedMatrix
from . import SCHEMES, is_finite, not_finite

FIRST_RANGES = (1.0, 0.9, 0.8, 0.7)  # of a group's own range: where the fit begins; it goes on from the best
ROUNDS = 8
PIECE = 2**18  # weights that are fitted at once: the temporaries stay small
DAMPING = 0.01  # of the mean square of the inputs, added to each: what a text did not show is not taken for zero
BLOCK = 128  # inputs whose errors are handed on to all later ones at once


class Ranges(NamedTuple):
    """Of each group [outputs, groups, 1]: value = (quantized - zero) * scale, both in bfloat16."""

    scale: Tensor
    zero: Tensor


def fit(weight: Tensor, qmax: int, group: int, moments: Tensor | None = None) -> tuple[Tensor, Ranges]:
    """Floats [outputs, inputs] -> uint8 from 0 to qmax, and the ranges; the last group may be short.

    moments: what is known of the inputs x: nothing, their mean squares [inputs], or the means of x_i x_j
    [inputs, inputs]. The error of a weight counts with its input's square; with products known, each weight's error is
    made up for by the weights that are rounded after it.
    """
    outputs, inputs = weight.shape
    weight = weight.float()
    squares = moments if moments is None or moments.dim() == 1 else moments.diagonal()
    padded = pad(weight[None], (0, -inputs % group), mode="replicate")[0]
    if not is_finite(padded):
        raise not_finite()
    share = None if squares is None else _shares(squares, group)
    rows = torch.split(padded.view(outputs, -1, group), max(1, PIECE // inputs))
    # Made anew for each step, it took four fifths of the time.
    scratch = torch.empty(3, *rows[0].shape, device=weight.device)
    fitted = [_fit(part, share, qmax, *scratch[:, : len(part)]) for part in rows]
    ranges = Ranges(*(torch.cat(parts) for parts in zip(*fitted, strict=True)))
    if moments is not None and moments.dim() == 2:
        return feed_back(weight, ranges, qmax, group, moments), ranges
    quantized = _round(padded.view(outputs, -1, group), ranges.scale, ranges.zero, qmax)
    return quantized.to(torch.uint8).view(outputs, -1)[:, :inputs], ranges


def quantize(
    scheme: str, pack: Callable[[Tensor], Tensor], weight: Tensor, group: int, moments: Tensor | None
) -> QuantizedMatrix:
    """Floats [outputs, inputs] fitted as `fit` says, packed by the scheme."""
    form = SCHEMES[scheme]
    form.check(weight.shape[1])
    quantized, ranges = fit(weight, (1 << form.bits) - 1, group, moments)
    return QuantizedMatrix(pack(quantized), *(part[..., 0].contiguous() for part in ranges))


def dequantize(unpack: Callable[[Tensor], Tensor], matrix: QuantizedMatrix, group: int) -> Tensor:
    """The float32 matrix [outputs, inputs] that is meant."""
    assert matrix.zero is not None
    quantized = unpack(matrix.values)
    scale, zero = (spread(part, group, quantized.shape[1]) for part in (matrix.scale, matrix.zero))
    return (quantized - zero) * scale


def spread(numbers: Tensor, group: int, inputs: int) -> Tensor:
    """One number a group [outputs, groups] -> one a weight, in float32 [outputs, inputs]."""
    return numbers.float().repeat_interleave(group, dim=1)[:, :inputs]


def feed_back(weight: Tensor, ranges: Ranges, qmax: int, group: int, moments: Tensor) -> Tensor:
    """Quantized, uint8 [outputs, inputs], with little error in the outputs, for inputs of these mean products.

    GPTQ (arXiv 2210.17323): inputs are rounded one after the other, those with the largest squares first; what the
    rounding of one changes in the output, the weights of those to come take up, as far as their inputs go along with
    it. The inverse's Cholesky factor U gives all these shares: weight j changes by error_i / U_ii * U_ij.
    """
    outputs, inputs = weight.shape
    order = moments.diagonal().argsort(descending=True)
    products = moments[order][:, order].clone()
    products.diagonal().add_(DAMPING * products.diagonal().mean().clamp(min=1e-12))
    shares = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)
    w = weight[:, order].t().contiguous()  # an input's weights lie together
    scale, zero = (spread(part[..., 0], group, inputs)[:, order].t().contiguous() for part in ranges)
    quantized = torch.empty_like(w)
    for first in range(0, inputs, BLOCK):
        block = slice(first, min(first + BLOCK, inputs))
        errors = torch.empty_like(w[block])
        for i in range(block.start, block.stop):
            quantized[i] = _round(w[i], scale[i], zero[i], qmax)
            error = torch.sub(w[i], (quantized[i] - zero[i]) * scale[i], out=errors[i - first]).div_(shares[i, i])
            w[i + 1 : block.stop].addr_(shares[i, i + 1 : block.stop], error, alpha=-1)
        w[block.stop :].addmm_(shares[block, block.stop :].t(), errors, alpha=-1)
    found = torch.empty(outputs, inputs, dtype=torch.uint8, device=weight.device)
    found[:, order] = quantized.t().to(torch.uint8)
    return found


def _shares(squares: Tensor, group: int) -> Tensor:
    """Of each input in its group's sum of squares [groups, group]: a little for each, and none behind the last."""
    known = squares.float() + DAMPING * squares.mean() + 1e-30
    groups = pad(known, (0, -len(known) % group)).view(-1, group)
    return groups / groups.sum(-1, keepdim=True)


def _fit(w: Tensor, share: Tensor | None, qmax: int, q: Tensor, centred: Tensor, product: Tensor) -> Ranges:
    """Ranges of groups [rows, groups, group] of least squared error, each weight's with its share [groups, group].

    Weights are rounded to a range, then the range of least squares for what they became is taken, in turn. Plain
    rounding between minimum and maximum errs a fifth more. q, centred, product: like w, written over.
    """

    def total(numbers: Tensor) -> Tensor:
        return (numbers if share is None else torch.mul(numbers, share, out=product)).sum(-1, keepdim=True)

    def mean(numbers: Tensor) -> Tensor:
        return numbers.mean(-1, keepdim=True) if share is None else total(numbers)  # the shares of a group are 1

    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_base = torch.ones_like(low), low.clone()
    middle_of_w = mean(w)
    for part in FIRST_RANGES:
        scale = ((high - low) * part / qmax).clamp(min=1e-12)
        base = (low + high) / 2 - scale * qmax / 2
        for _ in range(ROUNDS):
            middle = mean(_nearest(w, scale, base, qmax, q))
            torch.sub(q, middle, out=centred)
            covariance = total(torch.mul(centred, w, out=product))
            scale = covariance / total(centred.square_()).clamp(min=1e-12)
            # Steps between whole numbers are no larger, but for noise divided by noise where all weights are the same.
            scale = torch.minimum(scale, high - low).clamp_(min=1e-12)
            base = middle_of_w - scale * middle
        error = total(_nearest(w, scale, base, qmax, q).mul_(scale).add_(base).sub_(w).square_())
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_base = torch.where(better, scale, best_scale), torch.where(better, base, best_base)
    scale = best_scale.bfloat16()
    return Ranges(scale, (-best_base / scale).bfloat16())


def _nearest(w: Tensor, scale: Tensor, base: Tensor, qmax: int, out: Tensor) -> Tensor:
    """The integers 0 to qmax whose scale * integer + base is nearest to w."""
    return torch.sub(w, base, out=out).div_(scale).round_().clamp_(0, qmax)


def _round(w: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """The nearest integers 0 to qmax for the ranges as they are kept."""
    return torch.div(w, scale).add_(zero).round_().clamp_(0, qmax)
