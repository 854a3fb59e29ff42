"""How a layout stores the weight of one linear layer: as floats, or as small whole numbers with scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol

from ..checkpoint import FITS, FLOATS, why_no_float
from ..quantization import Groups

if TYPE_CHECKING:
    from torch import Tensor

    from ..weights import GroupMatrix

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

    def groups(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Groups | None:
        """The form in which kernels compute with it; None if it becomes floats."""

    def keep(self, tensors: Sequence[Tensor], groups: Groups) -> GroupMatrix:
        """The weight in that form."""


class InNoGroups:
    """What encodings share that become floats."""

    def groups(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> None:
        return None

    def keep(self, tensors: Sequence[Tensor], groups: Groups) -> NoReturn:
        raise ValueError("a weight that becomes floats is in no groups")


class Floats(InNoGroups):
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


def spread_groups(scales: Tensor, zeros: Tensor, size: int, inputs: int, groups: Groups) -> tuple[Tensor, Tensor]:
    """Scales and zero points [groups of `size` inputs, out] -> those of `groups` [out, groups], in the scales' type."""
    import torch

    of = torch.arange(0, inputs, groups.group) // size
    return scales[of].t().contiguous(), zeros[of].t().to(scales.dtype).contiguous()


def codes(words: Tensor, bits: int) -> Tensor:
    """Numbers of `bits` bits out of 32-bit words, lowest bits first: [n, words] -> int32 [n, words * 32 / bits]."""
    import torch

    from ..quantization.groups import unpack

    return unpack(words.contiguous().view(torch.uint8), bits)
