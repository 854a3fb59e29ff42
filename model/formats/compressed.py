"""compressed-tensors' symmetric forms, with a scale for a tensor, an output, or a group of an output's inputs.

Source: the compressors of compressed-tensors. Scales of activations (`input_scale`) are for products in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..checkpoint import FLOATS
from ..quantization import MLX, Groups
from .encoding import Fault, InNoGroups, Shape, codes
from .foreign import FROM_SOURCE

if TYPE_CHECKING:
    from torch import Tensor

    from ..weights import GroupMatrix

BITS = (2, 4, 8)  # of packed codes: versions part where words hold no whole number of them


class Scaled(InNoGroups):
    """float-quantized, int-quantized: weight F8_E4M3 or I8 [out, in], value = weight * scale."""

    name = "compressed-tensors"
    parts: tuple[str, ...] = ("weight", "weight_scale")
    marker = "weight_scale"

    def check(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Fault | None:
        fits = shapes[0] == wanted and dtypes[0] in ("F8_E4M3", "I8") and dtypes[1] in FLOATS
        return None if fits and _groups(shapes[1], wanted) else _fault(dtypes, shapes)

    def unpack(self, tensors: Sequence[Tensor], wanted: Shape) -> Tensor:
        return _scaled(*tensors)


class Packed:
    """pack-quantized: weight_packed I32 [out, in * bits / 32], value = (code - 2^(bits - 1)) * scale."""

    name = "compressed-tensors"
    parts: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")
    marker = "weight_packed"

    def check(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Fault | None:
        fits = self._bits(shapes[0], wanted) and dtypes[0] == "I32" and dtypes[1] in FLOATS
        return None if fits and _groups(shapes[1], wanted) else _fault(dtypes, shapes)

    def _bits(self, words: Shape, wanted: Shape) -> int | None:
        return next((bits for bits in BITS if words == (wanted[0], wanted[1] * bits // 32)), None)

    def unpack(self, tensors: Sequence[Tensor], wanted: Shape) -> Tensor:
        bits = self._bits(tuple(tensors[0].shape), wanted)
        assert bits is not None
        return _scaled(codes(tensors[0], bits) - 2 ** (bits - 1), tensors[1])

    def groups(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Groups | None:
        if shapes[1][:1] != wanted[:1]:
            return None  # a scale for all outputs
        return Groups.exactly(MLX, self._bits(shapes[0], wanted), wanted[1] // _groups(shapes[1], wanted), dtypes[1])

    def keep(self, tensors: Sequence[Tensor], groups: Groups) -> GroupMatrix:
        import torch

        from ..weights import GroupMatrix

        words, scales = tensors[:2]
        biases = scales * -(2.0 ** (groups.bits - 1))
        return GroupMatrix(words.view(torch.uint8), scales, biases, groups.bits, groups.group)


def _groups(scale: Shape, wanted: Shape) -> int:
    """How many groups an output has, by the shape of the scales; 0 if it is none of theirs."""
    if scale in ((), (1,), (1, 1)):
        return 1
    return scale[1] if len(scale) == 2 and scale[0] == wanted[0] and scale[1] and not wanted[1] % scale[1] else 0


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    """values [out, in] times scales: one, one an output, or one a group [out, groups]."""
    groups = scale.shape[-1] if scale.dim() == 2 else 1
    return (values.float().view(len(values), groups, -1) * scale.float().reshape(-1, groups, 1)).view(values.shape)


def _fault(dtypes: Sequence[str], shapes: Sequence[Shape]) -> Fault:
    found = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in zip(dtypes, shapes, strict=True))
    return Fault(f"is {found}, unlike compressed-tensors' symmetric forms", FROM_SOURCE)
