"""Numbers: what is stored of a matrix in few bits, and how it is fitted to the floats. Products are in `kernels/`.

`SCHEMES` is the only list of the forms that are made here, for checkpoints, plans, kernels and flags; `KEPT` that of
forms which other programs make and kernels compute with: `BLOCKS` of llama.cpp, `Groups` of the others. Imports without
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from math import gcd
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import ModelError, NotFiniteError

if TYPE_CHECKING:
    from torch import Tensor

    from ..weights import QuantizedMatrix

BITS = {"I8": 8, "U8": 8, "F32": 32, "BF16": 16}  # of safetensors' types


@dataclass(frozen=True)
class Scheme:
    """One form of a matrix [outputs, inputs]: its parts as a checkpoint stores them, under safetensors' type names."""

    bits: int  # a weight
    parts: Mapping[str, str]  # of which `weight` holds the quantized values, the others one number a group
    groups: tuple[int, ...] = ()  # inputs that may share a scale, the usual one first; none: all of an output do
    on_cards: bool = False  # whether there are kernels in Triton

    @property
    def group(self) -> int:
        """The usual one of `groups`; 0 where there are none."""
        return self.groups[0] if self.groups else 0

    def check(self, inputs: int) -> None:
        """`ModelError` for inputs that fill no whole bytes."""
        if inputs * self.bits % 8:
            fits = 8 // gcd(8, self.bits)
            raise ModelError(f"{self.bits} bits are for inputs in {fits}s, and a matrix has {inputs}", "take int8")

    def shapes(self, group: int, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Shape of each part; the last group may be short."""
        self.check(inputs)
        values = outputs, inputs * self.bits // BITS[self.parts["weight"]]
        ranges = (outputs, -(-inputs // group)) if self.groups else (outputs,)
        return {part: values if part == "weight" else ranges for part in self.parts}

    def bytes_per_weight(self, group: int = 0) -> float:
        """Scales included, as far as they count: one an output does not."""
        ranges = sum(BITS[dtype] for part, dtype in self.parts.items() if part != "weight")
        return (self.bits + (ranges / (group or self.group) if self.groups else 0)) / 8

    def nbytes(self, group: int, outputs: int, inputs: int) -> int:
        """Bytes of all parts."""
        shapes = self.shapes(group, outputs, inputs)
        return sum(
            outputs * (shape[1] if len(shape) > 1 else 1) * BITS[self.parts[p]] // 8 for p, shape in shapes.items()
        )


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8": Scheme(8, {"weight": "I8", "scale": "F32"}, on_cards=True),
        "int4": Scheme(4, {"weight": "U8", "scale": "BF16", "zero": "BF16"}, (32, 64, 128, 256), on_cards=True),
        "int3": Scheme(3, {"weight": "U8", "scale": "BF16", "zero": "BF16"}, (128,)),
    }
)


@dataclass(frozen=True)
class Block:
    """One of ggml's types: so many inputs of an output lie together, with their scales."""

    inputs: int
    nbytes: int


BLOCKS: Mapping[str, Block] = MappingProxyType(
    {
        "Q4_0": Block(32, 18),
        "Q4_1": Block(32, 20),
        "Q5_0": Block(32, 22),
        "Q5_1": Block(32, 24),
        "Q8_0": Block(32, 34),
        "IQ4_NL": Block(32, 18),
        "Q2_K": Block(256, 84),
        "Q3_K": Block(256, 110),
        "Q4_K": Block(256, 144),
        "Q5_K": Block(256, 176),
        "Q6_K": Block(256, 210),
        "IQ4_XS": Block(256, 136),
    }
)


@dataclass(frozen=True)
class Groups:
    """A form of MLX, GPTQ or AWQ: few bits a weight, scale and offset for each group of an output's inputs."""

    scheme: str
    bits: int
    group: int  # inputs, one of `GROUP_SIZES`
    itemsize: int = 2  # of scale and offset, as they are held

    @classmethod
    def exactly(cls, scheme: str, bits: int | None, inputs: int, dtype: str) -> Groups | None:
        """In groups of so many inputs, with scales of a safetensors type; None where kernels take no such groups."""
        return cls(scheme, bits, inputs, 4 if dtype == "F32" else 2) if bits and inputs in GROUP_SIZES else None

    @classmethod
    def of(cls, scheme: str, bits: int | None, inputs: int, dtype: str) -> Groups | None:
        """In the largest groups that kernels take of which groups of so many inputs are made up; None without any."""
        group = next((group for group in reversed(GROUP_SIZES) if inputs % group == 0), 0)
        return cls.exactly(scheme, bits, group, dtype)

    @property
    def name(self) -> str:
        return f"{self.scheme}-{self.bits}bit-g{self.group}"

    @property
    def bytes_per_weight(self) -> float:
        return self.bits / 8 + 2 * self.itemsize / self.group


# The schemes of weights that stay as another program packed them: of one type or several.
KEPT = GGUF, MLX, GPTQ, AWQ = "gguf", "mlx", "gptq", "awq"
GROUP_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)  # inputs
GROUP_FORMS: Mapping[str, Groups] = MappingProxyType(
    {
        form.name: form
        for scheme in (MLX, GPTQ, AWQ)
        for bits in GROUP_BITS
        for group in GROUP_SIZES
        for form in [Groups(scheme, bits, group)]
    }
)
DENSE = "int8"  # of attention and head, whatever the experts have


def dequantize(scheme: str, matrix: QuantizedMatrix, group: int) -> Tensor:
    """The float32 matrix [outputs, inputs] that is meant, as the scheme's own file here has it."""
    settings = {"group": group} if scheme in SCHEMES and SCHEMES[scheme].groups else {}
    module = ".blocks" if scheme == GGUF else ".groups" if scheme in KEPT else f".{scheme}"
    numbers = import_module(module, __name__)
    floats: Tensor = numbers.dequantize(matrix, **settings)
    return floats


def quantize(scheme: str, group: int, weight: Tensor, moments: Tensor | None = None) -> QuantizedMatrix:
    """A matrix in a scheme with groups, fitted to what is known of its inputs (`affine.fit`)."""
    numbers = import_module(f".{scheme}", __name__)
    stored: QuantizedMatrix = numbers.quantize(weight, group, moments)
    return stored


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are: by their bounds, which are NaN where one is: isfinite() takes twenty times as long."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def not_finite() -> NotFiniteError:
    """What a matrix with NaN or infinity in it is refused with: products of integers would hide them."""
    return NotFiniteError(
        "the weights hold numbers that are not finite", "check the files with `dbrx download MODEL --verify`"
    )
