"""GPTQ's encoding: value = (code - zero) * scale, where each input names its group.

Source: the linear layers of AutoGPTQ and GPTQModel. Format "gptq" stores zeros lowered by one, "gptq_v2" as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint import FITS
from ..quantization import GPTQ, Groups
from ..safetensors_file import shown
from .encoding import Fault, Shape, codes, spread_groups
from .foreign import GPTQ_WAY, READABLE_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from ..weights import GroupMatrix

FORMATS = ("gptq", "gptq_v2")


class Gptq:
    """qweight int32 [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out], g_idx [in]."""

    name = "GPTQ"
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    marker = "g_idx"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._format = settings.get("checkpoint_format") or settings.get("format") or FORMATS[0]
        self._lowered = FORMATS[1] not in (settings.get("checkpoint_format"), settings.get("format"))
        self._in_order = settings.get("desc_act") is False  # inputs are in the groups' order
        self._group_size = settings.get("group_size")

    def check(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Fault | None:
        out, inputs = wanted
        if self._format not in FORMATS:
            return Fault(f"is in the format {shown(str(self._format))} of GPTQ", GPTQ_WAY)
        bits = self._bits(shapes[0], wanted)
        if bits is None:
            return Fault(
                f"is quantized to other than 2, 3, 4 or 8 bits (qweight has shape {list(shapes[0])})", GPTQ_WAY
            )
        groups = shapes[2][0] if len(shapes[2]) == 2 else 0
        fits = shapes == [(inputs * bits // 32, out), (groups, out * bits // 32), (groups, out), (inputs,)]
        if not fits or dtypes[0] != "I32" or dtypes[1] != "I32" or dtypes[2] not in ("F16", "F32", "BF16"):
            found = f"has shapes {[list(shape) for shape in shapes]} and types {', '.join(dtypes)}, unlike GPTQ's"
            return Fault(found, FITS)
        return None if dtypes[3] in ("I32", "I64") else Fault(f"has group numbers of the type {dtypes[3]}", GPTQ_WAY)

    def _bits(self, words: Shape, wanted: Shape) -> int | None:
        return next(
            (bits for bits in READABLE_BITS["gptq"] if len(words) == 2 and words[0] * 32 == wanted[1] * bits), None
        )

    def unpack(self, tensors: Sequence[Tensor], wanted: Shape) -> Tensor:
        words, packed_zeros, scales, groups = tensors
        bits = self._bits(tuple(words.shape), wanted)
        assert bits is not None
        by_group, index = scales.float().t(), groups.long()
        if int(index.min()) < 0:  # PyTorch would count from the end
            raise IndexError
        values = codes(words.t(), bits) - self._zeros(packed_zeros, bits).t()[:, index]
        return values * by_group[:, index]

    def groups(self, dtypes: Sequence[str], shapes: Sequence[Shape], wanted: Shape) -> Groups | None:
        bits, size = self._bits(shapes[0], wanted), self._size(wanted[1])
        if not self._in_order or not size or -(-wanted[1] // size) != shapes[2][0]:
            return None
        return Groups.of(GPTQ, bits, size, dtypes[2])

    def keep(self, tensors: Sequence[Tensor], groups: Groups) -> GroupMatrix:
        import torch

        from ..weights import GroupMatrix

        words, packed_zeros, scales, index = tensors
        inputs = len(index)
        size = self._size(inputs)
        if not torch.equal(index.long(), torch.arange(inputs) // size):
            raise ValueError("has inputs in another order than that of its groups, though desc_act is false")
        ranges = spread_groups(scales, self._zeros(packed_zeros, groups.bits), size, inputs, groups)
        values = words.t().contiguous().view(torch.uint8)
        return GroupMatrix(values, *ranges, groups.bits, groups.group, zero_points=True)

    def _size(self, inputs: int) -> int:
        """Inputs of a group; 0 where the settings do not tell."""
        size = self._group_size
        return inputs if size == -1 else size if type(size) is int and size > 0 else 0

    def _zeros(self, packed: Tensor, bits: int) -> Tensor:
        zeros = codes(packed, bits)
        return (zeros + 1) & (2**bits - 1) if self._lowered else zeros
