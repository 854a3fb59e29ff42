"""How a layout stores the weight of one linear layer: as floats, or as small whole numbers with scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..checkpoint import FITS, FLOATS, why_no_float

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


class Fault(NamedTuple):
    """What is wrong with a stored matrix, and what to do."""

    what: str
    hint: str


class Encoding(Protocol):
    """Tensors beside each other under a module's name that make up its weight [out, in]."""

    name: str
    parts: tuple[str, ...]  # their last names
    marker: str  # the one by which the encoding is known

    def check(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Fault | None:
        """What is wrong with the parts of a weight of shape `wanted`; None if nothing is."""

    def unpack(self, tensors: Sequence[Tensor], wanted: Shape) -> Tensor:
        """The weight, in a float type."""


class Floats:
    """The weight itself."""

    name = "float"
    parts: tuple[str, ...] = ("weight",)
    marker = "weight"

    def check(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Fault | None:
        if shapes[0] != wanted:
            return Fault(f"has shape {list(shapes[0])}, config.json asks for {list(wanted)}", FITS)
        return (
            None
            if dtypes[0] in FLOATS
            else Fault(f"has the type {dtypes[0]}, {why_no_float(dtypes[0])[0]}", why_no_float(dtypes[0])[1])
        )

    def unpack(self, tensors: Sequence[Tensor], wanted: Shape) -> Tensor:
        return tensors[0]


def codes(words: Tensor, bits: int) -> Tensor:
    """Numbers of `bits` bits out of 32-bit words, lowest bits first: [n, words] -> int32 [n, words * 32 / bits]."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    apart: Tensor = (words.view(torch.int32).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return apart.flatten(-2)
