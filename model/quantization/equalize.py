"""A whole expert in few bits, made so that it loses less."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..weights import FloatExpert, QuantizedExpert, QuantizedMatrix

ROWS = 128  # whose floats stay in a cache
Moments = tuple[Tensor, Tensor]  # of the inputs of w1 and v1, and of w2, as `affine.fit` takes them


def quantize_expert(
    expert: FloatExpert, quantize: Callable[..., QuantizedMatrix], moments: Moments | None = None
) -> QuantizedExpert:
    """Equalized, then each matrix in few bits, as it is stored: w2 by its outputs.

    `quantize` is given a matrix, and the moments of its inputs where they are known.
    """
    w1, v1, w2 = expert
    number = equalizer(w1, v1)
    outer: tuple[Tensor, ...] = ()
    inner: tuple[Tensor, ...] = ()
    if moments is not None:
        outer, inner = (moments[0],), (_divided(moments[1], number[:, 0]),)
    # One after the other: a matrix's floats go before those of the next come.
    first, second = quantize(w1, *outer), quantize(v1 * (1 / number), *outer)
    down = torch.empty(w2.t().shape, device=w2.device)
    return QuantizedExpert(first, second, quantize(torch.mul(w2.t(), number.t(), out=down), *inner))


def _divided(moments: Tensor, number: Tensor) -> Tensor:
    """Moments of inputs that are divided by a number each."""
    return moments / (number.square() if moments.dim() == 1 else torch.outer(number, number))


def equalizer(w1: Tensor, v1: Tensor) -> Tensor:
    """Give the inner activations like magnitudes: v1's row j is divided, w2's row j multiplied by the same number.

    The inner activation j is act(w1_j x) (v1_j x): it grows with |w1_j| |v1_j|, and w2's j-th input counts as much more
    in the output. With the root of that product as the number, large activations no longer rule the common range of
    all, and the weights that they meet are rounded finer. No data is needed, and nothing is computed at run time. On
    the demo model the divergence of 4-bit experts falls from 0.15 to 0.11. (AWQ, arXiv 2306.00978, scales by measured
    activations instead.)
    """
    gate, up = map(_norms, (w1, v1))
    size = (gate * up).clamp(min=1e-12).log()
    number: Tensor = (size - size.mean()).mul(0.5).exp().clamp(2**-6, 2**6)[:, None]
    return number


def _norms(matrix: Tensor) -> Tensor:
    """Of each row, in float32: given a dtype, PyTorch would make such a copy of the whole matrix."""
    room = matrix.new_empty(ROWS, matrix.shape[1], dtype=torch.float32)
    parts = (room[: len(rows)].copy_(rows) for rows in torch.split(matrix, ROWS))
    return torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in parts])
