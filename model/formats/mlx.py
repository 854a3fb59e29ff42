"""MLX's affine quantization: value = code * scale + bias, for each group of one output's inputs.

Source: https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..checkpoint import FITS, FLOATS
from ..quantization import GROUP_BITS, MLX, Groups
from .encoding import Fault, Shape
from .foreign import MLX_WAY

if TYPE_CHECKING:
    from torch import Tensor

    from ..weights import GroupMatrix


class Mlx:
    """weight uint32 [out, in * bits / 32], scales and biases [out, in / group]; bits and group follow from these."""

    name = "MLX"
    parts: tuple[str, ...] = ("weight", "scales", "biases")
    marker = "scales"

    def check(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Fault | None:
        if dtypes[0] != "U32" or any(dtype not in FLOATS for dtype in dtypes[1:]):
            return Fault(f"is quantized in a way of MLX that is not supported (types {', '.join(dtypes)})", MLX_WAY)
        if any(len(shape) != 2 or shape[0] != wanted[0] for shape in shapes) or shapes[1] != shapes[2]:
            return Fault(f"has shapes {[list(shape) for shape in shapes]}, which make no {list(wanted)}", FITS)
        groups = shapes[1][1]
        if self._bits(shapes[0], wanted) is None or not groups or wanted[1] % groups:
            odd = f"is quantized to other than 2 to 6 or 8 bits, or in odd groups ({[list(s) for s in shapes]})"
            return Fault(odd, MLX_WAY)
        return None

    def _bits(self, words: Shape, wanted: Shape) -> int | None:
        return next((bits for bits in GROUP_BITS if words[1] * 32 == wanted[1] * bits), None)

    def unpack(self, tensors: Sequence[Tensor], wanted: Shape) -> Tensor:
        from ..quantization.groups import dequantize

        bits = self._bits(tuple(tensors[0].shape), wanted)
        assert bits is not None
        return dequantize(self.keep(tensors, Groups(MLX, bits, wanted[1] // tensors[1].shape[1])))

    def groups(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Groups | None:
        if dtypes[1] != dtypes[2]:
            return None
        return Groups.exactly(MLX, self._bits(shapes[0], wanted), wanted[1] // shapes[1][1], dtypes[1])

    def keep(self, tensors: Sequence[Tensor], groups: Groups) -> GroupMatrix:
        import torch

        from ..weights import GroupMatrix

        words, scales, biases = tensors
        return GroupMatrix(words.view(torch.uint8), scales, biases, groups.bits, groups.group)
