"""Layouts with a module for each expert, or for each of q, k and v, as converters make them for other tools.

Each module's weight may be stored as floats, or packed as MLX, GPTQ or AWQ do. All are mapped to Databricks' names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NoReturn

from ..checkpoint import (
    EMBEDDING,
    FITS,
    HARMLESS,
    MATRICES,
    TORCH_NAMES,
    Checkpoint,
    expected_tensors,
    listed,
    name_other_layout,
)
from ..errors import ModelError
from ..model_files import ModelFiles
from ..placement import Format
from ..quantization import Groups
from ..safetensors_file import TensorInfo, damaged
from ..weights import CheckpointWeights, Extent, FloatExpert, GroupMatrix, KeptExpert, kept_format
from .awq import Awq
from .compressed import Packed, Scaled
from .encoding import Encoding, Floats, Shape
from .foreign import MLX_WAY, quantization_of
from .gptq import Gptq
from .mlx import Mlx

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STACK = "ffn.experts.mlp."
FUSED = "norm_attn_norm.attn.Wqkv"
# Where a block keeps matrix {m} of expert {e}.
EXPERTS = (
    "ffn.experts.mlp.{e}.{m}",  # the "converted" checkpoints, and what GPTQ tools made of them
    "ffn.experts.mlp_experts.{e}.{m}",  # the "fixed" ones
    "ffn.experts.mlp.experts.{e}.{m}",
    "ffn.experts.{e}.{m}",  # MLX
)
QKV = tuple(f"norm_attn_norm.attn.{part}_proj" for part in "qkv")
FIRST = "transformer.blocks.0."
FLOATS: Encoding = Floats()
MARKERS = tuple(each.marker for each in (Mlx, Gptq, Awq, Packed, Scaled))


def is_unfused(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether tensors have the names of these layouts, or Databricks' names and an encoding."""
    modules = {name.rpartition(".")[0] for name in tensors}
    apart = (*(name.format(e=0, m="w1") for name in EXPERTS), QKV[0])
    packed = any(f"{FIRST}{FUSED}.{marker}" in tensors for marker in MARKERS)
    return packed or any(FIRST + name in modules for name in apart)


class Module:
    """One stored matrix and how it becomes floats in Databricks' orientation; `shape` is that of the layer's weight."""

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, TensorInfo],
        shape: Shape,
        encodings: Sequence[Encoding],
        transposed: bool = False,
    ) -> None:
        self.shape, self.transposed = shape, transposed
        self.groups: Groups | None = None  # the form in which kernels compute with it
        self.encoding: Encoding = next((p for p in encodings if f"{name}.{p.marker}" in tensors), FLOATS)
        # A stack of experts is a parameter of its own, without .weight.
        self.names = [name] if name in tensors else [f"{name}.{part}" for part in self.encoding.parts]
        self.missing = [part for part in self.names if part not in tensors]
        self.infos = [tensors[part] for part in self.names if part in tensors]
        if self.missing:
            return
        stored = [info.dtype for info in self.infos], [info.shape for info in self.infos]
        fault = self.encoding.check(*stored, shape)
        if fault:
            raise ModelError(f"{self.infos[0].file}: {name} {fault.what}", fault.hint)
        self.groups = self.encoding.groups(*stored, shape)

    def values(self, tensors: Sequence[Tensor]) -> Tensor:
        """The matrix out of its stored tensors."""
        try:
            values = self.encoding.unpack(tensors, self.shape)
        except IndexError:
            raise damaged(self.infos[0].file, f"{self.names[0]} names groups that are not there") from None
        return values.t() if self.transposed else values

    def keep(self, tensors: Sequence[Tensor]) -> GroupMatrix:
        """The matrix in the form of `groups`, by the outputs of its layer."""
        assert self.groups is not None
        try:
            return self.encoding.keep(tensors, self.groups)
        except ValueError as error:
            raise ModelError(f"{self.infos[0].file}: {self.names[0]} {error}", "--dtype bfloat16 reads it") from None


class UnfusedWeights(CheckpointWeights):
    """A checkpoint folder whose experts, or whose projections, are apart; see `Weights` for the methods.

    Packed tensors come in bfloat16 from `read` unless it is told otherwise, packed experts in float32 from `expert`.
    """

    quantization = "none"
    plain_experts = False

    def __init__(self, files: ModelFiles, checkpoint: Checkpoint) -> None:
        self.source = files.path
        self.config = files.config
        self._checkpoint = checkpoint
        settings = quantization_of(files)
        named: dict[str, list[Encoding]] = {"awq": [Awq()], "compressed-tensors": [Packed(), Scaled()]}
        by_name = named.get(str(settings.get("quant_method")), [])
        self._encodings: tuple[Encoding, ...] = (Gptq(settings), *by_name, Mlx())  # all have scales
        found = checkpoint.tensors
        if self.config.n_layers > len(found):  # before a table of that length is made
            raise ModelError(f"{files.path}: holds {len(found)} tensors, too few for {self.config.n_layers} layers")
        modules = {name.rpartition(".")[0] for name in found}
        self._experts = next((name for name in EXPERTS if FIRST + name.format(e=0, m="w1") in modules), None)
        self._split = FIRST + QKV[0] in modules
        self._shapes = expected_tensors(self.config)
        self._modules = {name: self._parts(name, shape) for name, shape in self._shapes.items()}
        self._check()

    def _parts(self, name: str, shape: Shape) -> list[Module]:
        """The modules that make up a tensor of Databricks' layout, in its order."""
        found, d = self._checkpoint.tensors, self.config.d_model
        block, stack, matrix = name.rpartition(STACK)
        if stack and self._experts:
            ffn = self.config.ffn_config
            names = [block + self._experts.format(e=e, m=matrix) for e in range(ffn.moe_num_experts)]
            size = (ffn.ffn_hidden_size, d)
            # A linear layer, which is what all known converters make, has w2 transposed; its shape tells.
            first = found.get(f"{names[0]}.weight")
            transposed = matrix == "w2" and (size[0] == size[1] or first is None or first.shape != size)
            size = size[::-1] if transposed else size
            return [Module(each, found, size, self._encodings, transposed) for each in names]
        if FUSED in name and self._split:
            kv_size = self.config.attn_config.kv_n_heads * self.config.head_dim
            names = [name.replace(f"{FUSED}.weight", part) for part in QKV]
            sizes = ((d, d), (kv_size, d), (kv_size, d))
            return [Module(each, found, size, self._encodings) for each, size in zip(names, sizes, strict=True)]
        return [Module(name if stack else name.removesuffix(".weight"), found, shape, self._encodings)]

    def _check(self) -> None:
        """Exactly the tensors that the configuration asks for; `Module` checks shapes and types."""
        modules = [module for parts in self._modules.values() for module in parts]
        missing = [name for module in modules for name in module.missing]
        known = {name for module in modules for name in module.names}
        unexpected = sorted(n for n in self._checkpoint.tensors if n not in known and not HARMLESS.fullmatch(n))
        source = self._checkpoint.source
        if missing:
            name_other_layout(source, unexpected)
            hint = MLX_WAY if all(name.endswith(".biases") for name in missing) else FITS  # its other modes have none
            raise ModelError(f"{source}: {listed(missing, 'is', 'are')} missing", hint)
        if unexpected:
            raise ModelError(f"{source}: {listed(unexpected, 'does', 'do')} not belong to this model", FITS)

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", owned: bool = False
    ) -> Tensor:
        import torch

        parts = self._modules[name]
        if len(parts) == 1 and parts[0].encoding is FLOATS:
            tensor = self._checkpoint.read(parts[0].names[0], dtype, device)
            return tensor.clone() if owned else tensor
        stored = parts[0].infos[0].dtype if parts[0].encoding is FLOATS else "BF16"
        out = torch.empty(self._shapes[name], dtype=dtype or getattr(torch, TORCH_NAMES[stored]))
        start = 0
        for part in parts:
            values = part.values([self._checkpoint.read(each) for each in part.names])
            out[start : start + len(values)] = values
            start += len(values)
        return out.to(device)

    def nbytes_of(self, name: str) -> int:
        return sum(info.nbytes for module in self._modules[name] for info in module.infos)

    def expert_extents(self, layer: int, expert: int) -> tuple[Extent, ...]:
        infos = [info for module in self._matrices(layer, expert) for info in module.infos]
        return tuple(Extent(info.file, info.start, info.nbytes) for info in infos)

    def expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> FloatExpert:
        modules = self._matrices(layer, expert)
        stored = self._stored(modules, data)
        matrices = [module.values(tensors) for module, tensors in zip(modules, stored, strict=True)]
        return FloatExpert(*(matrix.contiguous() for matrix in matrices))

    def expert_matrix(self, layer: int, expert: int, matrix: int) -> Tensor:
        module = self._matrices(layer, expert)[matrix]
        (stored,) = self._stored([module], None)
        return module.values(stored).contiguous()

    def _stored(self, modules: Sequence[Module], data: tuple[Tensor, ...] | None) -> Iterator[list[Tensor]]:
        """The tensors of each module, from the mapped file or out of the bytes of their extents."""
        import torch

        start = 0
        for module in modules:
            if data is None:
                yield [self._checkpoint.read_part(info) for info in module.infos]
            else:
                raws = data[start : start + len(module.infos)]
                yield [
                    raw.view(getattr(torch, TORCH_NAMES[info.dtype])).view(info.shape)
                    for raw, info in zip(raws, module.infos, strict=True)
                ]
            start += len(module.infos)

    def _matrices(self, layer: int, expert: int) -> list[Module]:
        """The modules of one expert; a stack's slice is taken for a module."""
        stacks = [self._modules[f"transformer.blocks.{layer}.{STACK}{matrix}"] for matrix in MATRICES]
        if self._experts:
            return [stack[expert] for stack in stacks]
        size = (self.config.ffn_config.ffn_hidden_size, self.config.d_model)
        slices = []
        for (stack,) in stacks:
            (info,) = stack.infos
            nbytes = info.nbytes // self.config.ffn_config.moe_num_experts
            part = replace(info, shape=size, start=info.start + expert * nbytes, nbytes=nbytes)
            slices.append(Module(info.name, {info.name: part}, size, ()))
        return slices

    def quantized_expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> NoReturn:
        raise ValueError(f"{self.source}: this encoding is no format of the experts' kernels")

    @cached_property
    def kept(self) -> Format | None:
        """Bytes a weight in the form in which kernels compute with it; None if some experts become floats."""
        forms: Counter[Groups] = Counter()
        for name, shape in self._shapes.items():
            if STACK not in name:
                continue
            groups = self._groups(name)
            # w1 and v1 multiply the same rows, which a form has in an order of its own.
            if groups is None or (name.endswith(".v1") and groups != self._groups(name[:-2] + "w1")):
                return None
            forms[groups] += prod(shape)
        most = forms.most_common(1)[0][0]
        return kept_format(most.name, most.scheme, self._shapes, self._kept_bytes)

    def _kept_bytes(self, name: str) -> float:
        """Of a matrix in the form in which kernels compute with it."""
        groups = self._groups(name)
        return prod(self._shapes[name]) * (groups.bytes_per_weight if groups else self._float_bytes(name))

    def _groups(self, name: str) -> Groups | None:
        """The form that a tensor's modules share in which kernels compute with it; w2 by its outputs."""
        forms = {None if name.endswith(".w2") and not part.transposed else part.groups for part in self._modules[name]}
        return forms.pop() if len(forms) == 1 else None

    def kept_matrix(self, name: str) -> GroupMatrix | None:
        """A matrix of attention, the head or the embedding as it is stored; None where it is read as floats."""
        if self._groups(name) is None:
            return None
        parts = [part.keep([self._checkpoint.read(each) for each in part.names]) for part in self._modules[name]]
        if len(parts) == 1:
            return parts[0]
        import torch

        values, scale, offset = (torch.cat(rows) for rows in list(zip(*parts, strict=True))[:3])
        return parts[0]._replace(values=values, scale=scale, offset=offset)

    def kept_expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> KeptExpert:
        """One expert as it is stored, where `kept` tells sizes; `data` as in `expert`."""
        modules = self._matrices(layer, expert)
        stored = self._stored(modules, data)
        return KeptExpert(*(module.keep(tensors) for module, tensors in zip(modules, stored, strict=True)))

    def read_exactly(self, name: str) -> Tensor:
        """A tensor in bfloat16 if the file has it so, else in float32."""
        import torch

        return self.read(name, torch.bfloat16 if self._float_bytes(name) == 2 else torch.float32)

    def _float_bytes(self, name: str) -> int:
        """Of a number of what is in no groups: the embedding keeps its type, `read_exactly` gives all else."""
        dtype = self._modules[name][0].infos[0].dtype
        return 2 if dtype == "BF16" or (dtype == "F16" and name == EMBEDDING) else 4

    def dtypes(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for module in (module for parts in self._modules.values() for module in parts):
            packed = module.encoding is not FLOATS
            counted[module.encoding.name if packed else module.infos[0].dtype] += sum(i.nbytes for i in module.infos)
        return counted
