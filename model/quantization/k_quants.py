"""ggml's K-quants out of floats: blocks of 256 inputs, cut into sub-blocks whose scales are small whole numbers.

Q4_K and Q5_K: value = d * scale * q - dmin * minimum, with a scale and a minimum for 32 inputs; Q6_K: value =
d * scale * (q - 32), with a scale for 16. d and dmin are float16, one a block.
Layout: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PIECE = 2**19  # weights that are fitted at once: with fewer, most of the time goes into calls of torch
STARTS = ((0.0, 0.0), (0.0, 0.7), (0.7, 0.0), (0.7, 0.7))  # of a sub-block's range, steps cut off below and above
PEAKS = (-32.0, -33.5, -30.5)  # what the largest weight of a sub-block becomes first
ROUNDS = 3
LARGEST = 65504.0  # of float16
SMALLEST = 1e-30  # what is divided by instead of 0
LEAST = 1e-3  # of the mean, that the error of an input counts which was never seen


def quantize(weight: Tensor, kind: str, squares: Tensor | None = None) -> Tensor:
    """Finite float32 [outputs, inputs], inputs a multiple of 256 -> blocks uint8 [outputs, bytes], of little error.

    squares: mean squares of the inputs, by which squared errors count; else all count alike.
    """
    if squares is not None:
        squares = squares / squares.mean().clamp(min=SMALLEST) + LEAST

    def packed(piece: Tensor) -> Tensor:
        counts = None if squares is None else squares.expand_as(piece).reshape(-1, 256)
        return KINDS[kind](piece.reshape(-1, 256), counts).view(len(piece), -1)

    return torch.cat([packed(piece) for piece in torch.split(weight, max(1, PIECE // weight.shape[1]))])


def _q4(x: Tensor, counts: Tensor | None) -> Tensor:
    scales, quantized = _with_minimum(x, counts, 15)
    return torch.cat([*scales, _nibbles(quantized)], 1)


def _q5(x: Tensor, counts: Tensor | None) -> Tensor:
    scales, quantized = _with_minimum(x, counts, 31)
    bit = torch.arange(8, dtype=torch.uint8)[:, None]
    high = ((quantized >> 4) << bit).sum(1, dtype=torch.uint8)  # byte i has a bit of input i of each sub-block
    return torch.cat([*scales, high, _nibbles(quantized & 15)], 1)


def _nibbles(quantized: Tensor) -> Tensor:
    """uint8 [blocks, 8, 32] -> [blocks, 128]: sub-blocks 0 and 1 share bytes, 2 and 3, and so on."""
    pairs = quantized.view(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)


def _with_minimum(x: Tensor, counts: Tensor | None, qmax: int) -> tuple[list[Tensor], Tensor]:
    """d, dmin and packed scales of blocks [n, 256], and quantized 0 ... qmax uint8 [n, 8, 32]."""
    n, x = len(x), _columns(x, 32)
    sums = Sums(x, None if counts is None else _columns(counts, 32))
    scale, base = _fit(x, sums, qmax)
    d, scales = _in_few_bits(scale.view(n, 8), 63)
    scale = (d * scales).view(-1)
    # What rounding changed of a scale, the minimum makes up for, as far as it is the same for all weights.
    q = _nearest(x, scale, base, 0, qmax, torch.empty_like(x))
    minimum = (scale * sums.of(q) - sums.of_x).div_(sums.size).clamp_(min=0)
    dmin, minima = _in_few_bits(minimum.view(n, 8), 63)
    for _ in range(2):
        _nearest(x, (d * scales).view(-1), -(dmin * minima).view(-1), 0, qmax, q)
        d, dmin = _both(d, dmin, scales, minima, sums, q)
    quantized = _nearest(x, (d * scales).view(-1), -(dmin * minima).view(-1), 0, qmax, q)
    parts = [_bytes(d), _bytes(dmin), _six_bits(scales.to(torch.uint8), minima.to(torch.uint8))]
    return parts, quantized.t().contiguous().to(torch.uint8).view(n, 8, 32)


def _both(d: Tensor, dmin: Tensor, scales: Tensor, minima: Tensor, sums: Sums, q: Tensor) -> tuple[Tensor, Tensor]:
    """d and dmin of least squares for what a block's weights became; as they were where that does not tell them."""
    q_x, q_q = (part.view_as(scales) for part in sums.of_products(q))
    sum_q, sum_x = sums.of(q).view_as(scales), sums.of_x.view_as(scales)
    size = sums.size.view_as(scales) if isinstance(sums.size, Tensor) else sums.size

    def over(parts: Tensor) -> Tensor:
        return parts.sum(1, keepdim=True)

    dd, dm, mm = over(scales * scales * q_q), over(scales * minima * sum_q), over(minima * minima * size)
    dx, mx = over(scales * q_x), over(minima * sum_x)
    spread = dd * mm - dm * dm
    new, new_min = _half((dx * mm - mx * dm) / spread), _half((dx * dm - mx * dd) / spread)
    told = (spread > 1e-5 * dd * mm) & (new > 0) & (new_min >= 0)
    return torch.where(told, new, d), torch.where(told, new_min, dmin)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Two times 8 numbers of 6 bits -> 12 bytes: the upper bits of the last four lie above those of the first four."""
    first = [part[:, :4] | (part[:, 4:] >> 4) << 6 for part in (scales, minima)]
    return torch.cat([*first, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], 1)


def _q6(x: Tensor, counts: Tensor | None) -> Tensor:
    n, x = len(x), _columns(x, 16)
    sums = Sums(x, None if counts is None else _columns(counts, 16))
    d, scales = _in_few_bits(_fit_symmetric(x, sums).view(n, 16), -128)
    q = torch.empty_like(x)

    def rounded() -> Tensor:
        return _nearest(x, (d * scales).view(-1), None, -32, 31, q)

    q_x, q_q = (part.view(n, 16) for part in sums.of_products(rounded()))
    square = (scales * scales * q_q).sum(1, keepdim=True)
    d = _half(torch.where(square > 0, (scales * q_x).sum(1, keepdim=True) / square, d))
    # Of each half of a block, runs of 32 inputs share bytes: 0 and 2, 1 and 3; of the upper bits all four.
    runs = (rounded() + 32).t().contiguous().to(torch.uint8).view(n, 2, 4, 32)
    low, high = runs & 15, runs >> 4
    lows = low[:, :, :2] | low[:, :, 2:] << 4
    highs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat([lows.flatten(1), highs.flatten(1), scales.to(torch.int8).view(torch.uint8), _bytes(d)], 1)


KINDS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6}


def _columns(x: Tensor, size: int) -> Tensor:
    """Sub-blocks as columns [size, sub-blocks]: sums of them are sums of long rows, which are fast."""
    return x.reshape(-1, size).t().contiguous()


class Sums:
    """Sums over columns of x and of what they become, in which each number counts as much as `counts` says."""

    def __init__(self, x: Tensor, counts: Tensor | None) -> None:
        self._counts, self._x = counts, x if counts is None else x * counts
        self._counted, self._product = (torch.empty_like(x) for _ in range(2))
        self.size = float(len(x)) if counts is None else counts.sum(0)
        self.of_x = self._x.sum(0)

    def of(self, q: Tensor) -> Tensor:
        return self._of(q).sum(0)

    def of_products(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Of q * x and q * q."""
        q_x = torch.mul(q, self._x, out=self._product).sum(0)
        return q_x, torch.mul(q, self._of(q), out=self._product).sum(0)

    def _of(self, q: Tensor) -> Tensor:
        return q if self._counts is None else torch.mul(q, self._counts, out=self._counted)


def _fit(x: Tensor, sums: Sums, qmax: int) -> tuple[Tensor, Tensor]:
    """Of each column scale >= 0 and base <= 0 with which scale * q + base errs least.

    Weights are rounded to a range, then the range of least squares for what they became is taken, in turn.
    """
    size, low, high, sum_x = sums.size, x.amin(0).clamp(max=0), x.amax(0), sums.of_x
    step = (high - low) / qmax
    best, best_scale, best_base = torch.full_like(low, -1), step, low
    q = torch.empty_like(x)
    for below, above in STARTS:
        scale, base = step * (1 - (below + above) / qmax), (low + step * below).clamp(max=0)
        for _ in range(ROUNDS):
            sum_q = sums.of(_nearest(x, scale, base, 0, qmax, q))
            q_x, q_q = sums.of_products(q)
            spread = torch.maximum(size * q_q - sum_q * sum_q, 1e-5 * size * q_q).clamp_(min=SMALLEST)
            scale = (size * q_x - sum_q * sum_x) / spread
            base = (sum_x - scale * sum_q) / size
            if base.amax() > 0:  # which no minimum can say
                scale = torch.where(base > 0, q_x / q_q.clamp(min=SMALLEST), scale)
                base = base.clamp(max=0)
        # How much less the squared error is than that of zeros.
        gain = 2.0 * (scale * q_x + base * sum_x - scale * base * sum_q) - scale * scale * q_q - size * base * base
        better = gain > best
        best, best_scale, best_base = (
            torch.where(better, new, old) for new, old in ((gain, best), (scale, best_scale), (base, best_base))
        )
    return best_scale, best_base


def _fit_symmetric(x: Tensor, sums: Sums) -> Tensor:
    """Of each column the scale with which scale * q errs least, q from -32 to 31."""
    high, low = x.amax(0), x.amin(0)
    peak = torch.where(high > -low, high, low)
    best, best_scale = torch.full_like(peak, -1), torch.zeros_like(peak)
    q = torch.empty_like(x)
    for first in PEAKS:
        scale = peak / first
        for _ in range(ROUNDS):
            q_x, q_q = sums.of_products(_nearest(x, scale, None, -32, 31, q))
            scale = q_x / q_q.clamp(min=1e-12)
            gain = scale * q_x
            better = gain > best
            best, best_scale = torch.where(better, gain, best), torch.where(better, scale, best_scale)
    return best_scale


def _nearest(x: Tensor, scale: Tensor, base: Tensor | None, qmin: int, qmax: int, out: Tensor) -> Tensor:
    """The integers q whose scale * q + base is nearest to x, in `out`; any where the scale is 0."""
    shifted = x if base is None else torch.sub(x, base, out=out)
    return torch.mul(shifted, _inverse(scale), out=out).round_().clamp_(qmin, qmax)


def _in_few_bits(numbers: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """[n, k] -> a factor of float16 [n, 1] and whole numbers, the largest `qmax`; of both signs if that is below 0."""
    high, low = numbers.amax(1, keepdim=True), numbers.amin(1, keepdim=True)
    factor = _half(torch.where(high > -low, high, low) / qmax)
    return factor, (numbers * _inverse(factor)).round().clamp(min(qmax, 0), max(qmax, -qmax - 1))


def _inverse(scale: Tensor) -> Tensor:
    """Of 0 it is so large that only 0 is near: torch.where would take four times as long."""
    return 1 / (scale + SMALLEST)


def _half(numbers: Tensor) -> Tensor:
    return numbers.clamp(-LARGEST, LARGEST).half().float()


def _bytes(numbers: Tensor) -> Tensor:
    """[n, 1] -> their float16 as uint8 [n, 2]."""
    return numbers.half().view(torch.uint8)
