"""AWQ's encoding of 4 bits: value = (code - zero) * scale, for each group of one output's inputs.

Source: the linear layers "gemm" of AutoAWQ, which pack eight outputs into a word: the even ones, then the odd ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..checkpoint import FITS
from ..quantization import AWQ, Groups
from .encoding import Fault, Shape, codes, spread_groups

if TYPE_CHECKING:
    from torch import Tensor

    from ..weights import GroupMatrix

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of eight outputs in a word, in halves of a byte


class Awq:
    """qweight int32 [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""

    name = "AWQ"
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales")
    marker = "qzeros"

    def check(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Fault | None:
        out, inputs = wanted
        groups = shapes[2][0] if len(shapes[2]) == 2 else 0
        fits = shapes == [(inputs, out // 8), (groups, out // 8), (groups, out)] and groups and inputs % groups == 0
        if not fits or dtypes[0] != "I32" or dtypes[1] != "I32" or dtypes[2] not in ("F16", "F32", "BF16"):
            found = f"has shapes {[list(shape) for shape in shapes]} and types {', '.join(dtypes)}, unlike AWQ's"
            return Fault(found, FITS)
        return None

    def unpack(self, tensors: Sequence[Tensor], wanted: Shape) -> Tensor:
        words, zeros, scales = tensors
        of_group = self._codes(words).view(len(scales), -1, wanted[0]) - self._codes(zeros)[:, None]
        return (of_group * scales.float()[:, None]).view(wanted[::-1]).t()

    def groups(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Groups | None:
        return Groups.of(AWQ, BITS, wanted[1] // shapes[2][0], dtypes[2])

    def keep(self, tensors: Sequence[Tensor], groups: Groups) -> GroupMatrix:
        from ..quantization.int4 import pack
        from ..weights import GroupMatrix

        words, zeros, scales = tensors
        values = pack(self._codes(words).byte().t().contiguous())
        ranges = spread_groups(scales, self._codes(zeros), len(words) // len(scales), len(words), groups)
        return GroupMatrix(values, *ranges, groups.bits, groups.group, zero_points=True)

    def _codes(self, words: Tensor) -> Tensor:
        """[n, out / 8] -> int32 [n, out]."""
        found = codes(words, BITS)
        return found.view(len(words), -1, 8)[:, :, PLACES].view(found.shape)
