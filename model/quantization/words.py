"""Weights of few bits as compiled loops read them fastest where bytes do not become floats at once: in words.

A word is 32 bits. Masked, one of its weights is a number that is exact as a float where it stands: compiled loops need
no shift, and load words at once. Loops want neighbouring words to meet neighbouring inputs, so a word's own weights
belong to inputs far apart, and where many rows are multiplied these are put in the same order. Words are float32 by
name only: PyTorch's compiler loads other words through memory with AVX2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..formats import QuantizedMatrix
from .int4 import Int4, unpack
from .int8 import Int8
from .kernel import Packed, RowByRow, Rows, check_scales
from .widened import PIECE, linear, multiplies_bfloat16

WORD = 4  # bytes
NIBBLES = 8  # in a word
BLOCK = 32  # inputs that lie in the words of one lane


class WordRows(Int8, RowByRow):
    """Bytes for the weights only: (words [outputs, inputs / 4], scale [outputs]) for each matrix. Runs everywhere.

    Byte k of a row's word j is its input k * inputs / 4 + j.
    """

    name = "int8 words"

    def load(self, *stored: QuantizedMatrix) -> Packed:
        check_scales(stored)
        found: list[Tensor] = []
        for values, scale, _ in stored:
            padded = functional.pad(values, (0, -values.shape[1] % WORD))
            words = padded.view(len(values), WORD, -1).transpose(1, 2).contiguous().flatten(1)
            found += words.view(torch.float32), scale.clone()
        return tuple(found)

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        padded = functional.pad(x, (0, -x.shape[1] % WORD))
        return (padded.view(len(x), WORD, -1).transpose(1, 2).flatten(1),)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        pairs = zip(packed[::2], packed[1::2], strict=True)
        return torch.cat([linear(x[0], words.view(torch.int8)).mul_(scale) for words, scale in pairs], dim=1)


class NibbleRows(Int4, RowByRow):
    """4 bits for the weights only: (words [outputs, blocks, 4, groups], ranges [outputs, groups]) for each matrix.

    Nibble j of word (n, b, r, g) is the weight of output n for input g * group + 32 b + 8 r + j: a lane of a loop over
    g stays in one group, whose scale and zero point meet its sum. A range is a word too, the scale above the zero
    point, in bfloat16 both. The highest nibble is signed: 8 less.
    """

    name = "int4 words"
    dtype = torch.float32

    def load(self, *stored: QuantizedMatrix) -> Packed:
        if self.group % BLOCK:
            raise NotImplementedError(f"no groups of {self.group}")
        check_scales(stored)
        found: list[Tensor] = []
        for values, scale, zero in stored:
            assert zero is not None
            levels = functional.pad(unpack(values), (0, -2 * values.shape[1] % self.group)).view(-1, NIBBLES)
            levels[:, -1] ^= 8
            nibbles = (levels[:, 0::2] | levels[:, 1::2] << 4).view(torch.float32)
            words = nibbles.view(len(values), -1, self.group // BLOCK, BLOCK // NIBBLES).permute(0, 2, 3, 1)
            ranges = torch.stack((zero, scale), dim=-1).to(torch.bfloat16)  # the lower half of a word comes first
            found += words.contiguous(), ranges.view(torch.float32)[..., 0].clone()
        return tuple(found)

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        padded = functional.pad(x, (0, -x.shape[1] % self.group))
        rows = padded.view(len(x), -1, self.group).transpose(1, 2).flatten(1)
        return (rows.to(torch.bfloat16 if multiplies_bfloat16() else torch.float32),)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        (rows,) = x
        outputs = max(1, PIECE // rows.shape[1])
        pairs = zip(packed[::2], packed[1::2], strict=True)
        pieces = [piece for pair in pairs for piece in zip(*(part.split(outputs) for part in pair), strict=True)]
        parts = [functional.linear(rows, _floats(*piece).to(rows.dtype)) for piece in pieces]
        return torch.cat(parts, dim=1).float()


def _floats(words: Tensor, ranges: Tensor) -> Tensor:
    """A piece of a matrix [outputs, inputs] in float32, in the order in which its words hold it."""
    masks = torch.tensor([nibble_mask(j) for j in range(NIBBLES)], dtype=torch.int32)
    place = torch.tensor([16.0**-j for j in range(NIBBLES)])
    signed = torch.tensor([0.0] * (NIBBLES - 1) + [8.0])
    zero, scale = ranges[..., None].view(torch.bfloat16).float()[:, None, None, None].unbind(-1)
    levels = (words.view(torch.int32)[:, :, :, None] & masks[:, None]).float()
    return torch.addcmul((signed[:, None] - zero) * scale, levels, place[:, None] * scale).flatten(1)


def nibble_mask(j: int) -> int:
    """Of the j-th nibble of a word, as a signed number of 32 bits."""
    mask = 0xF << 4 * j
    return mask - (mask >> 31 << 32)
