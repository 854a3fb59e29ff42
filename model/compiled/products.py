"""How a compiled function multiplies rows with a matrix: a choice, by how the matrix is held.

Of lone rows, `ready` makes of rows in float32 what products with them share, and `times` is the product of each with a
matrix of its own. It reads the weights once, in the order in which they lie in memory, but in a few places at a time: a
core alone has so many more bytes under way. Of many rows, `ordered` and `weights` make what `tiles.multiply` takes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..quantization import blocks, int4
from ..quantization.int8 import LEVELS
from ..quantization.nibbles import (
    BLOCK,
    HIGH,
    LANES,
    NIBBLES,
    ROWS,
    SIGNS,
    groups_of,
    in_groups,
    padded,
    scale_and_zero,
    short_loops,
)
from .form import Matrices

Matrix = tuple[Tensor, ...]  # its parts; of several matrices, stacked: [matrices, ...] each
Integers = tuple[Tensor, Tensor]  # rows [n, inputs] of int16 or int8, and the step of each [n]: they are multiples

LONGEST = 4096  # numbers that are added in one loop: of more, PyTorch's compiler adds in steps, at half the speed
LINE = 16  # numbers of 32 bits that a processor's cache fetches at once
STREAMS = 4  # places of a matrix that a loop reads side by side: a fifth faster than one; eight are slower
MIDDLE = 8  # of a nibble: 32 x 8 x 127, the most that a sum over a block can then be, fits into 16 bits
NORM = 32000.0  # of a row of integers: no sum of the products of two leaves 32 bits (Cauchy and Schwarz)
TINY = 1e-30  # for what is divided by
CHAIN = 4  # products that are added one after the other: of more, each waits too long for the one before


class Product(Protocol):
    """Stateless: one object serves all matrices that are held in its way."""

    def ready(self, x: Tensor) -> Matrix:
        """What products of each row of x [rows, inputs] share: [rows, ...] each."""

    def times(self, rows: Matrix, matrices: Matrix, streams: int = STREAMS) -> Tensor:
        """Row i times matrix i, or a lone row times each: [matrices, outputs].

        streams: places of a matrix to read side by side; fewer where other matrices are read in the same loop.
        """

    def example(self, outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
        """A matrix with the right types and shapes, to compile for. dtype: of float weights."""


class InTiles(Product, Protocol):
    """One whose matrices can become integers."""

    def ordered(self, x: Tensor) -> Tensor:
        """Rows [n, inputs] in the order of the weights."""

    def weights(self, matrix: Matrix) -> Integers:
        """The matrix: [outputs, inputs]."""


class FloatProduct:
    """(values [outputs, inputs],)"""

    def ready(self, x: Tensor) -> Matrix:
        return (x,)

    def times(self, rows: Matrix, matrices: Matrix, streams: int = STREAMS) -> Tensor:
        row, sums = rows[0][:, None], []
        inputs = row.shape[-1]
        for part in matrices[0].chunk(streams, 1):
            products = part.float() * row
            if inputs > LONGEST:
                products = products.view(*products.shape[:2], _pieces(inputs, LONGEST), -1).sum(-1)
            sums.append(products.sum(-1))
        return torch.cat(sums, 1)

    def ordered(self, x: Tensor) -> Tensor:
        return x

    def weights(self, matrix: Matrix) -> Integers:
        return integers(matrix[0].float())

    def example(self, outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
        return (torch.empty(outputs, inputs, dtype=dtype),)


class BlockProduct:
    """(words [outputs / 64, inputs / 32, 16, 64],): see `FloatBlocks`."""

    def ready(self, x: Tensor) -> Matrix:
        pairs = kept(x.view(len(x), -1, blocks.INPUTS // 2, 2).permute(3, 0, 1, 2))
        return tuple(pairs.unbind())

    def times(self, rows: Matrix, matrices: Matrix, streams: int = STREAMS) -> Tensor:
        size = matrices[0].shape[3]
        pieces = _pieces(matrices[0].shape[2], LONGEST // size)
        first, second = (part.view(len(part), 1, pieces, -1, size, 1) for part in rows)
        found = []
        for part in matrices[0].chunk(max(1, streams // 2), 1):  # a block is four places already
            sums = []
            for lane in torch.split(part, LINE, -1):  # summed in one loop, which so reads a block as a whole
                words = lane.view(torch.int32).view(*lane.shape[:2], pieces, -1, *lane.shape[3:])
                lower, upper = (words << 16).view(torch.float32), (words & HIGH).view(torch.float32)
                sums.append((lower * first + upper * second).sum((3, 4)).sum(2))
            found.append(torch.cat(sums, -1))
        return torch.cat(found, 1).flatten(1)

    def example(self, outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
        return (torch.empty(outputs // blocks.OUTPUTS, inputs // blocks.INPUTS, blocks.INPUTS // 2, blocks.OUTPUTS),)


class ByteProduct(FloatProduct):
    """(values [outputs, inputs], scale [outputs]), the values made floats."""

    def times(self, rows: Matrix, matrices: Matrix, streams: int = STREAMS) -> Tensor:
        return super().times(rows, matrices[:1], streams) * matrices[1]

    def weights(self, matrix: Matrix) -> Integers:
        return matrix[0], matrix[1]

    def example(self, outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
        return torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs)


class ShortProduct(ByteProduct):
    """The same in integers, of which a row has 16 bits: sums are exact."""

    def ready(self, x: Tensor) -> Matrix:
        levels, step = integers(x)
        return kept(levels), step

    def times(self, rows: Matrix, matrices: Matrix, streams: int = STREAMS) -> Tensor:
        (levels, step), (values, scale) = (part[:, None] for part in rows), matrices
        sums = [(part.to(torch.int32) * levels).sum(-1, dtype=torch.int32) for part in values.chunk(streams, 1)]
        return torch.cat(sums, 1) * (scale * step)


class NibbleProduct:
    """(words [outputs / 2, groups / 8, blocks, 8, 16], ranges [outputs, groups]): see `NibbleRows`.

    In integers of 16 bits: a row has 8, with a range for each block, and a sum over a block is exact but for multiples
    of 2**16, as which it is smaller once weights are counted from their middle.
    """

    def __init__(self, group: int) -> None:
        self.group = group

    def ready(self, x: Tensor) -> Matrix:
        blocks = kept(padded(x, LANES * self.group)).view(len(x), -1, LANES, self.group // BLOCK, ROWS, NIBBLES)
        step = kept(blocks.abs().amax((4, 5)).clamp(min=TINY) / LEVELS)
        levels = (blocks / step[..., None, None]).round().to(torch.int32)
        sums, top = (part.sum(4, dtype=torch.int32).transpose(2, 3) for part in (levels.sum(5), levels[..., -1]))
        # A word that is shifted still has the nibbles above the one that is meant: what they add, the next input lacks.
        runs = levels - 16 * pad(levels, (1, -1))
        both = kept((runs & 0xFFFF | runs << 16).permute(0, 1, 3, 4, 5, 2))  # for both outputs of a word
        # What makes nibbles that are not the top ones signed, above the half that is looked at; floats by name.
        middle = kept((MIDDLE * (sums - top) << 16).view(torch.float32))
        return both.view(torch.int16), kept(step.transpose(2, 3)), kept(sums.float()), middle

    def times(self, rows: Matrix, matrices: Matrix, streams: int = STREAMS) -> Tensor:
        runs, step, sums, middle = (part[:, None] for part in rows)
        words, ranges = matrices
        places = [(r, j) for r in range(ROWS) for j in range(NIBBLES)]
        pieces = [
            _tree([(part[..., r, :] >> 4 * j) * runs[..., r, j, :] for r, j in places])
            for part in words.chunk(streams, 1)
        ]
        both = kept(torch.cat(pieces, 1))
        # Float32 by name, as words are. A half of each is taken for one output, then the other for its own.
        shift = 16 - 16 * torch.arange(2, dtype=torch.int32)[:, None, None, None, None]
        halves = both.view(torch.float32).view(torch.int32)[:, None] << shift
        found = (halves - middle.view(torch.int32)[:, None] >> 16).float()
        scale, zero = scale_and_zero(ranges.view(torch.int32).view(len(words), 2, words.shape[1], -1, 1, LANES))
        found = found - (zero - MIDDLE) * sums[:, None]
        return (found * (scale * step[:, None])).flatten(3).sum(-1).flatten(1)

    def ordered(self, x: Tensor) -> Tensor:
        return in_groups(x, self.group).flatten(1)

    def weights(self, matrix: Matrix) -> Integers:
        words, ranges = matrix[0].view(torch.float32).view(torch.int32) ^ SIGNS, matrix[1].view(torch.int32)
        scale, zero = map(kept, scale_and_zero(ranges))
        most = scale * torch.maximum(zero, int4.LEVELS - zero)  # that a weight can be: its norm need not be known
        step = kept(torch.linalg.vector_norm(most, dim=1) * self.group**0.5 / NORM)
        factors = kept(scale / step[:, None].clamp(min=TINY))
        places, found = 4 * torch.arange(NIBBLES, dtype=torch.int32)[:, None], []
        for half, *ranges_of in zip((words, words >> 16), factors.chunk(2), zero.chunk(2), strict=True):
            factor, middle = (part.view(len(words), -1, 1, 1, 1, LANES) for part in ranges_of)
            levels = (half[..., None, :] >> places & int4.LEVELS).float()
            found.append(((levels - middle) * factor).round().to(torch.int16))
        return torch.cat(found).flatten(1), step

    def example(self, outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
        groups = groups_of(inputs, self.group)
        shape = outputs // 2, groups // LANES, self.group // BLOCK, ROWS, 2 * LANES
        return torch.empty(shape, dtype=torch.int16), torch.empty(outputs, groups)


def _pieces(count: int, most: int) -> int:
    """Into how many equal ones so many are split for none to have more than `most`."""
    return next(n for n in range(1, count + 1) if count % n == 0 and count // n <= most)


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
    of_bytes = ShortProduct() if short_loops() else ByteProduct()
    products: dict[Matrices, Product] = {
        "floats": FloatProduct(),
        "blocks": BlockProduct(),
        "bytes": of_bytes,
        "widened": of_bytes,
        "nibbles": NibbleProduct(group),
    }
    return products[matrices]
