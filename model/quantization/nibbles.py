"""Weights of 4 bits as compiled loops read them fastest: in words of 16 bits, of which shifts and masks take them.

Loops want neighbouring words to meet neighbouring inputs, so a word's own weights belong to others; of many rows, the
inputs are put in the same order.
Words of 32 bits are float32 by name only: PyTorch's compiler loads others through memory with AVX2.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.torch_version import TorchVersion

from ..formats import QuantizedMatrix
from .int4 import Int4, unpack
from .kernel import Packed, RowByRow, Rows, check_scales
from .widened import multiplies_bfloat16

PIECE = 2**19  # weights that become floats at once
NIBBLES = 4  # in a word
ROWS = 8  # of words in a block
LANES = 8  # groups that a loop takes at once, with AVX2
BLOCK = ROWS * NIBBLES  # inputs whose weights lie in the words of one lane
SIGNS = -0x7FFF8000  # of the top nibbles of two words: turned, these are as they were stored
HIGH = -0x10000  # the upper half of a word: what a bfloat16 is of a float32


class NibbleRows(Int4, RowByRow):
    """4 bits for the weights: (words [outputs / 2, groups / 8, blocks, 8, 16], ranges [outputs, groups]), each matrix.

    Nibble j of word (n, h, b, r, 2 l) is the weight of output n for input (8 h + l) * group + 32 b + 4 r + j, of word
    (n, h, b, r, 2 l + 1) that of output n + outputs / 2. These have 16 bits, the top nibble less 8 and signed, and lie
    in the order in which they are read. A lane l of a loop stays in one group, whose scale and zero point meet its sum;
    zeros fill the lanes. A range is a word of 32 bits, the scale above the zero point, in bfloat16 both.
    """

    name = "int4 words"
    dtype = torch.float32

    def load(self, *stored: QuantizedMatrix) -> Packed:
        if self.group % BLOCK:
            raise NotImplementedError(f"no groups of {self.group}")
        if not short_loops():
            raise NotImplementedError("no vectors of 16-bit integers in compiled loops")
        check_scales(stored)
        found: list[Tensor] = []
        for values, scale, zero in stored:
            assert zero is not None
            levels = padded(unpack(values), LANES * self.group).view(-1, 2)
            shape = 2, len(values) // 2, -1, LANES, self.group // BLOCK, ROWS, 2
            pairs = (levels[:, 0] | levels[:, 1] << 4).view(shape)
            pairs[..., 1] ^= 0x80  # less 8, signed: what a shift brings down can be taken away exactly
            words = pairs.permute(1, 2, 4, 5, 3, 0, 6).flatten(4, 5).contiguous().view(torch.int16)[..., 0]
            ranges = torch.stack((zero, scale), dim=-1).to(torch.bfloat16)  # the lower half of a word comes first
            found += words, padded(ranges.view(torch.float32)[..., 0], LANES).clone()
        return tuple(found)

    def nbytes(self, outputs: int, inputs: int) -> int:
        return super().nbytes(outputs, groups_of(inputs, self.group) * self.group)

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        """The rows in the order of the words, each input as small as its nibble stands high; sums by group."""
        groups = in_groups(x, self.group).permute(1, 2, 3, 4, 0)
        places = torch.tensor([16.0**-j for j in range(NIBBLES)])[:, None, None]
        rows = _rows((groups * places).flatten(0, 3), inner)
        return rows.to(torch.bfloat16 if multiplies_bfloat16() else torch.float32), groups.sum((1, 2)).flatten(0, 1).t()

    def run(self, x: Rows, packed: Packed) -> Tensor:
        pairs = zip(packed[::2], packed[1::2], strict=True)
        return torch.cat([_columns(*x, *(part.view(torch.int32) for part in pair)) for pair in pairs]).t()


@cache
def short_loops() -> bool:
    """Whether compiled loops over integers of 16 bits become vectors: on x86, and as PyTorch allows it (2.13)."""
    return platform.machine() in ("x86_64", "AMD64") and TorchVersion(torch.__version__) >= "2.13"


def padded(x: Tensor, multiple: int) -> Tensor:
    """With zeros up to a multiple of so many columns."""
    return functional.pad(x, (0, -x.shape[-1] % multiple))


def in_groups(x: Tensor, group: int) -> Tensor:
    """Rows [n, inputs] in the order of `NibbleRows`: [n, groups / 8, group / 4, 4, 8]."""
    shape = groups_of(x.shape[1], group) // LANES, LANES, group // NIBBLES, NIBBLES
    return padded(x, LANES * group).view(-1, *shape).permute(0, 1, 3, 4, 2)


def groups_of(inputs: int, group: int) -> int:
    """How many a row of `NibbleRows` has, with those that only fill the lanes."""
    return LANES * -(-inputs // (LANES * group))


def scale_and_zero(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """What words of ranges, int32, hold: in float32."""
    return (ranges & HIGH).view(torch.float32), (ranges << 16).view(torch.float32)


def _rows(columns: Tensor, inner: bool) -> Tensor:
    """[inputs, n] -> [n, inputs], in memory too unless they are of one expert alone, which is what products want."""
    return columns.t() if inner else columns.t().contiguous()


def _columns(rows: Tensor, sums: Tensor, words: Tensor, ranges: Tensor) -> Tensor:
    """One matrix times rows as `NibbleRows` prepares them, a piece at a time: [outputs, rows] in float32."""
    scale, zero = scale_and_zero(ranges)
    columns, out = rows.t(), torch.mm(-zero * scale, sums.t())
    masks = torch.tensor([0xF << 4 * j for j in range(NIBBLES)], dtype=torch.int32)[:, None]
    outputs = min(len(words), max(1, PIECE // rows.shape[1]))
    shape = (outputs, *words.shape[1:4], NIBBLES, LANES)
    nibbles, floats = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
    for half, scales, outs in zip((words, words >> 16), scale.chunk(2), out.chunk(2), strict=True):
        pieces = (torch.split(whole, outputs) for whole in (half, scales, outs))
        for part, factors, found in zip(*pieces, strict=True):
            unsigned = (part ^ SIGNS)[..., None, :]
            levels = floats[: len(part)].copy_(torch.bitwise_and(unsigned, masks, out=nibbles[: len(part)]))
            weights = levels.mul_(factors.view(len(part), -1, 1, 1, 1, LANES)).flatten(1)
            found += torch.mm(weights.to(rows.dtype), columns)
    return out
