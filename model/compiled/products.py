"""How a compiled function multiplies rows with a matrix: a choice, by how the matrix is held.

Of a lone row, `ready` makes of rows in float32 what the products of each share, and `times` is a product of one of
them. It reads the weights once, in the order in which they lie in memory, but in a few places at a time: a core alone
has so many more bytes under way. Of many rows, `ordered` and `weights` make what `tiles.multiply` takes.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..quantization import int4
from ..quantization.int8 import LEVELS
from ..quantization.words import (
    BLOCK,
    LANES,
    NIBBLES,
    ROWS,
    WORD,
    groups_of,
    in_groups,
    in_words,
    padded,
    scale_and_zero,
)
from .form import Matrices

Matrix = tuple[Tensor, ...]
Integers = tuple[Tensor, Tensor]  # rows [n, inputs] of int16 or int8, and the step of each [n]: they are multiples

LONGEST = 4096  # numbers that are added in one loop: of more, PyTorch's compiler adds in steps, at half the speed
STREAMS = 4  # places of a matrix that a loop reads side by side: a fifth faster than one; eight are slower
OFFSET = 0x00808080  # makes bytes unsigned, all but the highest, whose sign is that of its word
MASKS = 0xFF, 0xFF00, 0xFF0000, -0x1000000
PAIR = 0x000F000F  # a nibble of each half of a word
SUMMED = 4  # rows of words whose products are added in 16 bits: 4 x 4 x 15 x 127 still fits
NORM = 32000.0  # of a row of integers: no sum of the products of two leaves 32 bits (Cauchy and Schwarz)
TINY = 1e-30  # for what is divided by
CHAIN = 4  # products that are added one after the other: of more, each waits too long for the one before


class Product(Protocol):
    """Stateless: one object serves all matrices that are held in its way."""

    def ready(self, x: Tensor) -> list[Any]:
        """What products of each row of x [rows, inputs] share."""

    def times(self, row: Any, matrix: Matrix, streams: int = STREAMS) -> Tensor:
        """A row that is ready times the matrix: [outputs].

        streams: places of the matrix to read side by side; 1 where other matrices are read in the same loop.
        """

    def ordered(self, x: Tensor) -> Tensor:
        """Rows [n, inputs] in the order of the weights."""

    def weights(self, matrix: Matrix) -> Integers:
        """The matrix: [outputs, inputs]."""

    def example(self, outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
        """A matrix with the right types and shapes, to compile for. dtype: of float weights."""


class FloatProduct:
    """(values [outputs, inputs],)"""

    def ready(self, x: Tensor) -> list[Tensor]:
        return list(x)

    def times(self, row: Tensor, matrix: Matrix, streams: int = STREAMS) -> Tensor:
        inputs, sums = len(row), []
        for part in matrix[0].chunk(streams):
            products = part.float() * row
            if inputs > LONGEST:
                pieces = next(n for n in range(2, inputs + 1) if inputs % n == 0 and inputs // n <= LONGEST)
                products = products.view(len(part), pieces, -1).sum(-1)
            sums.append(products.sum(-1))
        return torch.cat(sums)

    def ordered(self, x: Tensor) -> Tensor:
        return x

    def weights(self, matrix: Matrix) -> Integers:
        return integers(matrix[0].float())

    def example(self, outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
        return (torch.empty(outputs, inputs, dtype=dtype),)


class ByteProduct(FloatProduct):
    """(values [outputs, inputs], scale [outputs])"""

    def times(self, row: Tensor, matrix: Matrix, streams: int = STREAMS) -> Tensor:
        return super().times(row, matrix[:1], streams) * matrix[1]

    def weights(self, matrix: Matrix) -> Integers:
        return matrix[0], matrix[1]

    def example(self, outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
        return torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs)


class WordProduct:
    """(words [outputs, inputs / 4], scale [outputs]): see `WordRows`.

    A byte is masked, and a float that is exact where it stands in its word; the inputs make up for where that is.
    """

    def ready(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        runs = padded(x, WORD).view(len(x), WORD, -1)
        places = torch.tensor([256.0**-k for k in range(WORD)])
        return list(zip(kept(runs * places[:, None]), -128 * runs[:, :-1].sum((1, 2)), strict=True))

    def times(self, row: tuple[Tensor, Tensor], matrix: Matrix, streams: int = STREAMS) -> Tensor:
        runs, offset = row
        words, scale = matrix
        sums = []
        for part in words.chunk(streams):
            numbers = part.view(torch.int32) ^ OFFSET
            sums.append(_tree([(numbers & mask).float() * run for mask, run in zip(MASKS, runs, strict=True)]).sum(-1))
        return (torch.cat(sums) + offset) * scale

    def ordered(self, x: Tensor) -> Tensor:
        return in_words(x).flatten(1)

    def weights(self, matrix: Matrix) -> Integers:
        return matrix[0].view(torch.int8), matrix[1]

    def example(self, outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
        return torch.empty(outputs, -(-inputs // WORD)), torch.empty(outputs)


class NibbleProduct:
    """(words [outputs / 2, blocks, 8, groups], ranges [outputs, groups]): see `NibbleRows`.

    In integers: a row has 8 bits, with a range for each block. Both halves of a word are multiplied at once; their sums
    are taken apart before one could reach into the other. One stream: arithmetic takes the time, not memory.
    """

    def __init__(self, group: int) -> None:
        self.group = group

    def ready(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [self._ready(row) for row in x]  # not all at once: their products would become one loop, a slower one

    def times(self, row: tuple[Tensor, Tensor, Tensor], matrix: Matrix, streams: int = STREAMS) -> Tensor:
        runs, step, sums = row[0].view(torch.int32), *row[1:]
        words, ranges = (part.view(torch.int32) for part in matrix)
        low, high = [], []
        for start in range(0, ROWS, SUMMED):
            places = [(r, j) for r in range(start, start + SUMMED) for j in range(NIBBLES)]
            both = _tree([((words[:, :, r] >> 4 * j) & PAIR) * runs[:, r, j] for r, j in places])
            low.append(both << 16 >> 16)
            high.append((both + 0x8000) >> 16)
        found = []
        for sum_of, bits in zip((low, high), ranges[:, None].chunk(2), strict=True):
            scale, zero = scale_and_zero(bits)
            found.append(((_tree(sum_of).float() - zero * sums) * (scale * step)).sum(-1).sum(-1))
        return torch.cat(found)

    def ordered(self, x: Tensor) -> Tensor:
        return in_groups(x, self.group).permute(0, 2, 3, 1).flatten(1)

    def weights(self, matrix: Matrix) -> Integers:
        words, ranges = (part.view(torch.int32) for part in matrix)
        scale, zero = map(kept, scale_and_zero(ranges))
        most = scale * torch.maximum(zero, int4.LEVELS - zero)  # that a weight can be: its norm need not be known
        step = kept(torch.linalg.vector_norm(most, dim=1) * self.group**0.5 / NORM)
        factors = kept(scale / step[:, None].clamp(min=TINY))
        places, found = 4 * torch.arange(NIBBLES, dtype=torch.int32)[:, None], []
        for half, *ranges_of in zip((words, words >> 16), factors.chunk(2), zero.chunk(2), strict=True):
            factor, middle = (part[:, None, None, None] for part in ranges_of)
            levels = (half[:, :, :, None] >> places & int4.LEVELS).float()
            found.append(((levels - middle) * factor).round().to(torch.int16))
        return torch.cat(found).flatten(1), step

    def example(self, outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
        groups = groups_of(inputs, self.group)
        return torch.empty(outputs // 2, self.group // BLOCK, ROWS, groups), torch.empty(outputs, groups)

    def _ready(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = kept(padded(x, LANES * self.group)).view(-1, self.group // BLOCK, ROWS, NIBBLES)
        step = kept(blocks.abs().amax((2, 3)).clamp(min=TINY) / LEVELS)
        levels = (blocks / step[..., None, None]).round().to(torch.int32)
        runs = kept(levels.view(torch.float32).permute(1, 2, 3, 0))  # floats by name, as words are
        return runs, kept(step.t()), kept(levels.sum((2, 3)).float().t())


def integers(x: Tensor) -> Integers:
    """Floats [n, inputs] as the nearest multiples of a step, of which each row has as many."""
    step = kept(torch.linalg.vector_norm(x, dim=1).clamp(min=TINY) / NORM)
    inverse = kept(1 / step)
    return (x * inverse[:, None]).round().to(torch.int16), step


def _tree(parts: list[Tensor]) -> Tensor:
    """Their sum, with few that wait for each other."""
    while len(parts) > 1:
        parts = [sum(parts[i + 1 : i + CHAIN], parts[i]) for i in range(0, len(parts), CHAIN)]
    return parts[0]


def kept(x: Tensor) -> Tensor:
    """Computed once, into memory, and not again in each loop that reads it, which PyTorch's compiler would do."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def product(matrices: Matrices, group: int) -> Product:
    """That of matrices which are held in this way."""
    products: dict[Matrices, Product] = {
        "floats": FloatProduct(),
        "bytes": ByteProduct(),
        "words": WordProduct(),
        "nibbles": NibbleProduct(group),
    }
    return products[matrices]
