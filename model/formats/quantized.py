"""Checkpoints that `dbrx quantize` wrote: safetensors with few bits a weight (docs/quantization.md)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ..checkpoint import FITS, MATRICES, TORCH_NAMES, Checkpoint, expected_tensors, listed
from ..config import DbrxConfig
from ..errors import ModelError
from ..model_files import ModelFiles
from ..quantization import DENSE as DENSE_SCHEME
from ..quantization import SCHEMES, dequantize
from ..safetensors_file import TensorInfo
from ..weights import CheckpointWeights, Extent, FloatExpert, QuantizedExpert, QuantizedMatrix
from .foreign import quantization_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHOD = "dbrx"
VERSION = 1
STACKED = ".ffn.experts.mlp."
EXPERT = "transformer.blocks.{}.ffn.experts.{}."
DENSE = (".attn.Wqkv.weight", ".attn.out_proj.weight", "lm_head.weight")


def layout(config: DbrxConfig, quantization: str, group: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> type and shape of every quantized tensor, each expert's together. Floats are not in it."""
    d, hidden = config.d_model, config.ffn_config.ffn_hidden_size
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(prefix: str, quantization: str, outputs: int, inputs: int) -> None:
        for part, shape in SCHEMES[quantization].shapes(group, outputs, inputs).items():
            shapes[prefix + part] = SCHEMES[quantization].parts[part], shape

    for name, shape in expected_tensors(config).items():
        if name.endswith(DENSE):
            add(name.removesuffix("weight"), DENSE_SCHEME, *shape)
    for layer in range(config.n_layers):
        for expert in range(config.ffn_config.moe_num_experts):
            for matrix in MATRICES:
                sizes = (d, hidden) if matrix == "w2" else (hidden, d)
                add(f"{EXPERT.format(layer, expert)}{matrix}.", quantization, *sizes)
    return shapes


class QuantizedWeights(CheckpointWeights):
    """Experts in one of `SCHEMES`, attention and head in int8, the rest in floats; see `Weights` for the methods."""

    plain_experts = False
    group: int

    def __init__(self, files: ModelFiles) -> None:
        self.source = files.path
        self.config = files.config
        self.quantization, self.group = _settings(files)
        self._checkpoint = Checkpoint.open(files.path)
        self._check()
        self._experts = self._find_experts()

    def _check(self) -> None:
        """Exactly the tensors of the layout, or a `ModelError`."""
        tensors, source = self._checkpoint.tensors, self._checkpoint.source
        if self.config.n_layers * self.config.ffn_config.moe_num_experts > len(tensors):  # before a table is made
            raise ModelError(f"{source}: holds {len(tensors)} tensors, too few for this config.json", FITS)
        wanted = layout(self.config, self.quantization, self.group)
        floats = {
            name: shape
            for name, shape in expected_tensors(self.config).items()
            if not name.endswith(DENSE) and STACKED not in name
        }
        missing = [name for name in (*wanted, *floats) if name not in tensors]
        extra = sorted(tensors.keys() - wanted.keys() - floats.keys())
        if missing or extra:
            what = listed(missing, "is", "are") + " missing" if missing else listed(extra, "does", "do") + " not belong"
            raise ModelError(f"{source}: {what}", FITS)
        for name, shape in floats.items():
            _require(tensors[name], ("F32", "BF16", "F16"), shape)
        for name, (dtype, shape) in wanted.items():
            _require(tensors[name], (dtype,), shape)

    def _find_experts(self) -> dict[tuple[int, int], list[TensorInfo]]:
        """The parts of each expert as they lie in its file."""
        found = {}
        for layer in range(self.config.n_layers):
            for expert in range(self.config.ffn_config.moe_num_experts):
                names = [
                    f"{EXPERT.format(layer, expert)}{m}.{part}"
                    for m in MATRICES
                    for part in SCHEMES[self.quantization].parts
                ]
                infos = [self._checkpoint.tensors[name] for name in names]
                found[layer, expert] = sorted(infos, key=lambda info: (info.file, info.start))
        return found

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", owned: bool = False
    ) -> Tensor:
        import torch

        from ..quantization import int8

        if STACKED in name:
            layer, matrix = int(name.split(".")[2]), MATRICES.index(name.rsplit(".", 1)[1])
            experts = range(self.config.ffn_config.moe_num_experts)
            tensor = torch.cat([self.expert_matrix(layer, expert, matrix).to(dtype) for expert in experts])
        elif name.endswith(DENSE):
            tensor = int8.dequantize(self.quantized_matrix(name))
        else:
            tensor = self._checkpoint.read(name)
            tensor = tensor.clone() if owned else tensor
        return tensor.to(device=device, dtype=dtype or tensor.dtype)

    def quantized_matrix(self, name: str) -> QuantizedMatrix:
        """A matrix of attention or the head as it is stored, mapped; by Databricks' name."""
        prefix = name.removesuffix("weight")
        return QuantizedMatrix(*(self._checkpoint.read(prefix + part) for part in SCHEMES[DENSE_SCHEME].parts))

    def nbytes_of(self, name: str) -> int:
        if STACKED in name:
            layer, matrix = name.split(".")[2], name.rsplit(".", 1)[1]
            experts = range(self.config.ffn_config.moe_num_experts)
            names = [
                f"{EXPERT.format(layer, e)}{matrix}.{part}"
                for e in experts
                for part in SCHEMES[self.quantization].parts
            ]
        elif name.endswith(DENSE):
            names = [name.removesuffix("weight") + part for part in SCHEMES[DENSE_SCHEME].parts]
        else:
            names = [name]
        return sum(self._checkpoint.tensors[each].nbytes for each in names)

    def expert_extents(self, layer: int, expert: int) -> tuple[Extent, ...]:
        extents: list[Extent] = []
        for info in self._experts[layer, expert]:
            last = extents[-1] if extents else None
            if last is not None and last.file == info.file and last.start + last.nbytes == info.start:
                extents[-1] = Extent(last.file, last.start, last.nbytes + info.nbytes)
            else:
                extents.append(Extent(info.file, info.start, info.nbytes))
        return tuple(extents)

    def quantized_expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> QuantizedExpert:
        parts = self._parts(layer, expert, data)
        prefix = EXPERT.format(layer, expert)
        return QuantizedExpert(
            *(
                QuantizedMatrix(*(parts[f"{prefix}{m}.{part}"] for part in SCHEMES[self.quantization].parts))
                for m in MATRICES
            )
        )

    def _parts(self, layer: int, expert: int, data: tuple[Tensor, ...] | None) -> dict[str, Tensor]:
        """An expert's tensors by name, from the mapped file or out of the bytes of its extents."""
        import torch

        infos = self._experts[layer, expert]
        if data is None:
            return {info.name: self._checkpoint.read(info.name) for info in infos}
        parts = {}
        for extent, raw in zip(self.expert_extents(layer, expert), data, strict=True):
            for info in infos:
                at = info.start - extent.start
                if info.file == extent.file and 0 <= at < extent.nbytes:
                    stored: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
                    piece = raw[at : at + info.nbytes]
                    aligned = piece if piece.data_ptr() % stored.itemsize == 0 else piece.clone()
                    parts[info.name] = aligned.view(stored).view(info.shape)
        return parts

    def expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> FloatExpert:
        """One expert in float32."""
        return FloatExpert(*map(self._floats, self.quantized_expert(layer, expert, data), MATRICES))

    def expert_matrix(self, layer: int, expert: int, matrix: int) -> Tensor:
        return self._floats(self.quantized_expert(layer, expert)[matrix], MATRICES[matrix])

    def _floats(self, stored: QuantizedMatrix, matrix: str) -> Tensor:
        values = dequantize(self.quantization, stored, self.group)
        return values.t() if matrix == "w2" else values


def _settings(files: ModelFiles) -> tuple[str, int]:
    """Kind and group of `quantization_config`."""
    path, found = files.path / "config.json", quantization_of(files)
    kind, version = found.get("kind"), found.get("version")
    if version != VERSION:
        raise ModelError(f"{path}: quantized in version {version!r} of the format", "update dbrx, or quantize it again")
    if not isinstance(kind, str) or kind not in SCHEMES:
        raise ModelError(f"{path}: quantization {kind!r} is not one of {', '.join(SCHEMES)}")
    group, groups = found.get("group", SCHEMES[kind].group), SCHEMES[kind].groups
    if groups and (type(group) is not int or group not in groups):
        raise ModelError(f"{path}: quantization group {group!r} is not one of {', '.join(map(str, groups))}")
    return kind, group if groups else 0


def _require(info: TensorInfo, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if info.dtype not in dtypes or info.shape != shape:
        found = f"{info.dtype} {list(info.shape)}"
        raise ModelError(f"{info.file}: {info.name} is {found}, not {dtypes[0]} {list(shape)}", FITS)
    assert info.nbytes * 8 >= prod(shape)
