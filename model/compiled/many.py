"""How a compiled function multiplies many rows: tile by tile (`tiles`), or by oneDNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from ..quantization import floats
from ..quantization.int8 import LEVELS, finer, scale_rows, split
from ..quantization.widened import multiplies_bfloat16
from .form import Matrices
from .products import InTiles, Matrix, Product, integers
from .tiles import multiply, pays


class Many(Protocol):
    """Products of many rows, for matrices that are held in one way."""

    def __call__(self, x: Tensor, matrices: Sequence[Matrix], inner: bool = False) -> list[Tensor]:
        """x [n, inputs] times each matrix: [n, outputs] float32. inner: x is what an expert computes before w2."""


class Tiles:
    """In integers of 16 bits; n is a multiple of `tiles.ROWS`."""

    def __init__(self, product: InTiles) -> None:
        self.product = product

    def __call__(self, x: Tensor, matrices: Sequence[Matrix], inner: bool = False) -> list[Tensor]:
        # Rows become integers for each: shared by two products, prompts in bfloat16 were a tenth slower.
        product = self.product
        return [multiply(integers(product.ordered(x.float())), product.weights(matrix)) for matrix in matrices]


class Floats:
    """By oneDNN, in the type of the weights."""

    def __call__(self, x: Tensor, matrices: Sequence[Matrix], inner: bool = False) -> list[Tensor]:
        return [(x.to(weights.dtype) @ weights.t()).float() for (weights,) in matrices]


class Blocks:
    """The same with weights in oneDNN's own order."""

    def __call__(self, x: Tensor, matrices: Sequence[Matrix], inner: bool = False) -> list[Tensor]:
        return [floats.multiply(x.to(torch.bfloat16), weights).float() for (weights,) in matrices]


class Bytes:
    """By oneDNN, with second rows for those that are peaked, as in `OneDnnByteRows`."""

    def __call__(self, x: Tensor, matrices: Sequence[Matrix], inner: bool = False) -> list[Tensor]:
        scaled, step, peaked = scale_rows(x.float(), LEVELS, inner)
        rounded, rest = split(scaled, LEVELS)
        n, seconds = x.shape[0], peaked.nonzero()[:, 0]
        rows = torch.cat((rounded.to(torch.int8), rest.round().to(torch.int8)[seconds]))
        firsts = torch.arange(n)
        places = torch.where(peaked, n - 1 + peaked.cumsum(0), firsts)  # of second rows, or of the row itself
        parts = (peaked / finer(LEVELS))[:, None]
        found = []
        for values, scale in matrices:
            products = torch._int_mm(rows, values.t())
            # Not sliced: a slice would ask whether so many are there.
            found.append((products[firsts].float() + products[places].float() * parts) * (scale * step))
        return found


def many(matrices: Matrices, product: Product, dtype: torch.dtype) -> Many | None:
    """The fastest way here that is compiled; None if none is. dtype: of float weights."""
    if pays(matrices, dtype):
        return Tiles(cast("InTiles", product))
    if matrices == "bytes":
        return Bytes()
    if matrices == "blocks":
        return Blocks()
    return Floats() if matrices == "floats" and dtype == torch.bfloat16 and multiplies_bfloat16() else None
