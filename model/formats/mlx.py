"""MLX's affine quantization: value = code * scale + bias, for each group of one output's inputs.

Source: https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..checkpoint import FITS, FLOATS
from .encoding import Fault, Shape, codes
from .foreign import MLX_WAY, READABLE_BITS

if TYPE_CHECKING:
    from torch import Tensor


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
            odd = f"is quantized to other than 2, 4 or 8 bits, or in odd groups ({[list(s) for s in shapes]})"
            return Fault(odd, MLX_WAY)
        return None

    def _bits(self, words: Shape, wanted: Shape) -> int | None:
        return next((bits for bits in READABLE_BITS if words[1] * 32 == wanted[1] * bits), None)

    def unpack(self, tensors: Sequence[Tensor], wanted: Shape) -> Tensor:
        words, scales, biases = tensors
        bits = self._bits(tuple(words.shape), wanted)
        assert bits is not None
        values = codes(words, bits).float().view(*scales.shape, -1)
        return (values * scales.float()[..., None] + biases.float()[..., None]).view(wanted)
