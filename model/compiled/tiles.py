"""How a compiled function multiplies many rows with a matrix: tile by tile, in integers of 16 bits.

AVX2 multiplies twice as many of them at once as floats, and adds their products in pairs. The loops are plain ones, for
the C++ compiler to turn into that (`vpmaddwd`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantization.nibbles import short_loops
from ..quantization.widened import multiplies_bfloat16
from .form import Matrices
from .products import Integers, kept

ROWS, OUTPUTS = 4, 2  # of a tile, whose sums a loop holds in registers
# For this processor, with leave to turn plain loops into vectors, but none to put sums of integers into an order of its
# own, where each addition waits for the one before, nor to begin more at once than there are registers.
LOOPS = "native -ftree-loop-vectorize -fno-tree-reassoc -fno-tree-ter"


def pays(matrices: Matrices | None, dtype: torch.dtype) -> bool:
    """Whether that is faster than products without a compiler, before which weights become floats.

    dtype: of float weights.
    """
    if not short_loops():
        return False
    if matrices == "floats":
        return dtype == torch.bfloat16 and not multiplies_bfloat16()
    return matrices in ("widened", "nibbles")


def multiply(rows: Integers, weights: Integers) -> Tensor:
    """[n, inputs] and [outputs, inputs] -> [n, outputs] float32; n is a multiple of `ROWS`."""
    values, scales = weights
    short = values.dtype == torch.int16
    if short:  # what a loop only reads, the C++ compiler reads again for each product: it is given bits to turn
        values = kept(~values)
    found = []
    for part, scale in zip(values.chunk(OUTPUTS), scales.chunk(OUTPUTS), strict=True):
        columns = (~part if short else part)[:, None].to(torch.int32)
        for row, step in zip(kept(rows[0]).chunk(ROWS), rows[1].chunk(ROWS), strict=True):
            found.append((columns * row).sum(-1, dtype=torch.int32) * (scale[:, None] * step))
    outputs, n = found[0].shape
    tiles = torch.stack(found).view(OUTPUTS, ROWS, outputs, n)
    return kept(tiles.permute(1, 3, 0, 2)).view(ROWS * n, OUTPUTS * outputs)
