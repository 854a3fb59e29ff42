"""Databricks' own layout: safetensors with the experts of a layer stacked in three tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from ..checkpoint import MATRICES, TORCH_NAMES, Checkpoint
from ..model_files import ModelFiles
from ..weights import CheckpointWeights, Extent, FloatExpert

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DatabricksWeights(CheckpointWeights):
    """A checkpoint folder as its makers wrote it; see `Weights` for the methods."""

    quantization = "none"
    plain_experts = True

    def __init__(self, files: ModelFiles, checkpoint: Checkpoint) -> None:
        self.source = files.path
        self.config = files.config
        self._checkpoint = checkpoint
        self._checkpoint.check(self.config)

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", owned: bool = False
    ) -> Tensor:
        tensor = self._checkpoint.read(name, dtype, device)
        return tensor.clone() if owned else tensor

    def nbytes_of(self, name: str) -> int:
        return self._checkpoint.tensors[name].nbytes

    def expert_extents(self, layer: int, expert: int) -> tuple[Extent, ...]:
        stacks = [self._checkpoint.tensors[_stack(layer, matrix)] for matrix in MATRICES]
        sizes = [info.nbytes // self.config.ffn_config.moe_num_experts for info in stacks]
        return tuple(
            Extent(info.file, info.start + expert * size, size) for info, size in zip(stacks, sizes, strict=True)
        )

    def expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> FloatExpert:
        import torch

        hidden = self.config.ffn_config.ffn_hidden_size
        if data is None:
            rows = slice(expert * hidden, (expert + 1) * hidden)
            return FloatExpert(*(self._checkpoint.read(_stack(layer, matrix))[rows] for matrix in MATRICES))
        infos = [self._checkpoint.tensors[_stack(layer, matrix)] for matrix in MATRICES]
        return FloatExpert(
            *(
                raw.view(getattr(torch, TORCH_NAMES[info.dtype])).view(hidden, self.config.d_model)
                for raw, info in zip(data, infos, strict=True)
            )
        )

    def expert_matrix(self, layer: int, expert: int, matrix: int) -> Tensor:
        return self.expert(layer, expert)[matrix]

    def quantized_expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> NoReturn:
        raise ValueError(f"{self.source}: the weights are not quantized")


def _stack(layer: int, matrix: str) -> str:
    return f"transformer.blocks.{layer}.ffn.experts.mlp.{matrix}"
