"""What every format of weights offers: the tensors of a DBRX network under Databricks' names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from .checkpoint import EMBEDDING
from .config import DbrxConfig
from .placement import Format

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Extent:
    """A run of bytes in a file."""

    file: Path
    start: int
    nbytes: int


class FloatExpert(NamedTuple):
    """One expert in a float type: w1, v1, w2 [ffn_hidden_size, d_model] each, w2 untransposed (h @ w2)."""

    w1: Tensor
    v1: Tensor
    w2: Tensor


class QuantizedMatrix(NamedTuple):
    """A matrix [out, in] in few bits: its value is (values - zero) * scale, for each group of one output's inputs.

    int8: values int8 [out, in], scale float32 [out], no zero. int4: values uint8 [out, in / 2] (an even input in the
    low half of a byte, the odd one after it in the high half), scale and zero bfloat16 [out, in / group], the last
    group maybe shorter. int3: the same with values uint8 [out, in * 3 / 8], as `int3.pack` says.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None


class QuantizedExpert(NamedTuple):
    """One expert in few bits, each matrix by its outputs: w1, v1 [ffn_hidden_size, d_model], w2 the other way round."""

    w1: QuantizedMatrix
    v1: QuantizedMatrix
    w2: QuantizedMatrix


class BlockMatrix(NamedTuple):
    """A matrix [out, in] in ggml's blocks of a kind in `BLOCKS`: values uint8 [out, bytes of a row]."""

    values: Tensor
    kind: str


class GroupMatrix(NamedTuple):
    """A matrix [out, in] as MLX, GPTQ and AWQ mean it: scale * value + offset, or scale * (value - offset).

    values: uint8 [out, in * bits / 8], bit by bit, the first input in the lowest bits; scale, offset: of one float
    type, [out, in / group], the last group maybe shorter.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    group: int
    zero_points: bool = False  # what `offset` has


KeptMatrix = BlockMatrix | GroupMatrix


class KeptExpert(NamedTuple):
    """One expert as another program packed it, each matrix by its outputs, like `QuantizedExpert`."""

    w1: KeptMatrix
    v1: KeptMatrix
    w2: KeptMatrix


class Weights(Protocol):
    """An opened and checked set of weights; a context manager. Nothing but headers is read by opening it."""

    config: DbrxConfig
    source: Path  # what messages name: the folder, or the file
    quantization: str  # how the experts are stored: "none" for a float type, else int8, int4, ...
    plain_experts: bool  # `expert` gives views of the stored bytes: who keeps these has the expert

    @property
    def kept(self) -> Format | None:
        """Bytes a weight as another program packed them, if kernels can compute with that (`KeptWeights`)."""

    @property
    def group(self) -> int | None:
        """Inputs that share a scale, where `quantization` has groups."""

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", owned: bool = False
    ) -> Tensor:
        """A whole tensor by Databricks' name; a float type. `owned`: copied, so that no file stays in use for it."""

    def nbytes_of(self, name: str) -> int:
        """Bytes of a tensor as it is stored."""

    def expert_extents(self, layer: int, expert: int) -> tuple[Extent, ...]:
        """Where one expert lies, for a reader that brings the bytes itself; adjacent runs are one."""

    def expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> FloatExpert:
        """One expert, from the mapped file or from `data`: uint8 tensors with the bytes of its extents, in order."""

    def expert_matrix(self, layer: int, expert: int, matrix: int) -> Tensor:
        """One of the three of `expert`, for who goes through a layer matrix by matrix: the others are not computed."""

    def quantized_expert(
        self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None
    ) -> QuantizedExpert | KeptExpert:
        """The same as it is stored, in the scheme that `quantization` names; `ValueError` where it names none."""

    def dtypes(self) -> Counter[str]:
        """Bytes by stored type, under safetensors' names ("BF16")."""

    def give_back(self) -> None:
        """Let the system have the memory of what was read from mapped files, once it has been copied."""

    def close(self) -> None:
        """Let go of the files."""

    def __enter__(self) -> Weights: ...

    def __exit__(self, *_: object) -> None: ...


class CheckpointWeights:
    """What formats share whose tensors lie in a folder of safetensors."""

    group: int | None = None
    _checkpoint: Checkpoint

    @property
    def kept(self) -> Format | None:
        return None

    def dtypes(self) -> Counter[str]:
        return self._checkpoint.dtypes()

    def give_back(self) -> None:
        self._checkpoint.give_back()

    def close(self) -> None:
        self._checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WrappedWeights:
    """Other weights, passed on; what differs is overridden."""

    def __init__(self, whole: Weights) -> None:
        self.config = whole.config
        self.source = whole.source
        self.quantization = whole.quantization
        self.group = whole.group
        self.plain_experts = whole.plain_experts
        self.kept = whole.kept
        self.whole = whole

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", owned: bool = False
    ) -> Tensor:
        return self.whole.read(name, dtype, device, owned)

    def nbytes_of(self, name: str) -> int:
        return self.whole.nbytes_of(name)

    def expert_extents(self, layer: int, expert: int) -> tuple[Extent, ...]:
        return self.whole.expert_extents(layer, expert)

    def expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> FloatExpert:
        return self.whole.expert(layer, expert, data)

    def expert_matrix(self, layer: int, expert: int, matrix: int) -> Tensor:
        return self.whole.expert_matrix(layer, expert, matrix)

    def quantized_expert(
        self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None
    ) -> QuantizedExpert | KeptExpert:
        return self.whole.quantized_expert(layer, expert, data)

    def dtypes(self) -> Counter[str]:
        return self.whole.dtypes()

    def give_back(self) -> None:
        self.whole.give_back()

    def close(self) -> None:
        self.whole.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CanBeKept(Weights, Protocol):
    """Weights whose `kept` may tell of a form."""

    def kept_matrix(self, name: str) -> KeptMatrix | None:
        """A matrix of attention, the head or the embedding as it is stored; None where it is read as floats."""

    def kept_expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> KeptExpert:
        """One expert as it is stored; `data` as in `Weights.expert`."""

    def read_exactly(self, name: str) -> Tensor:
        """A tensor in bfloat16 if the file has it so, else in float32."""


def kept_format(
    name: str, scheme: str, shapes: Mapping[str, tuple[int, ...]], nbytes: Callable[[str], float]
) -> Format:
    """What `Weights.kept` tells: of each part the mean of its matrices, each of which takes `nbytes` of its name.

    Norms and routers are in no part: they become floats. shapes: of `expected_tensors`.
    """
    sizes: dict[str, float] = defaultdict(float)
    numbers: dict[str, int] = defaultdict(int)
    for tensor, shape in shapes.items():
        if len(shape) == 2 and ".router." not in tensor:
            part = "experts" if ".experts." in tensor else "rest" if tensor == EMBEDDING else "linear"
            sizes[part] += nbytes(tensor)
            numbers[part] += prod(shape)
    return Format(name, **{part: sizes[part] / numbers[part] for part in sizes}, kept_as=scheme)


class KeptWeights(WrappedWeights):
    """The same for kernels that compute with what another program packed, as it lies in the file."""

    whole: CanBeKept

    def __init__(self, whole: CanBeKept, scheme: str) -> None:
        super().__init__(whole)
        self.quantization = scheme

    def kept_matrix(self, name: str) -> KeptMatrix | None:
        return self.whole.kept_matrix(name)

    def read_exactly(self, name: str) -> Tensor:
        return self.whole.read_exactly(name)

    def quantized_expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> KeptExpert:
        return self.whole.kept_expert(layer, expert, data)
