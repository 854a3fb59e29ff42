"""Products of the native library with weights as another program packed them, and rows of such an embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..native.abi import Matrix
from ..native.tensors import block_matrix, group_matrix
from ..quantization import GGUF, MLX, blocks, groups
from ..weights import BlockMatrix, KeptMatrix
from .base import Packed
from .native_call import FLOATS, float_matrix, function
from .native_linear import NativeProducts


class NativeKept(NativeProducts):
    """Matrices as `load` is given them, of a scheme in `KEPT`; `pack` holds floats, for what a file has in floats.

    bytes_per_weight: of the matrices of a file, on average.
    """

    def __init__(self, scheme: str, bytes_per_weight: float = 34 / 32) -> None:
        self.bytes_per_weight = bytes_per_weight
        self.form = self.quantization = scheme
        self.group = 0
        self.name = f"{scheme} native"
        self.reads_stored = scheme in (GGUF, MLX)  # the others are turned round as they are read

    def pack(self, *weights: Tensor) -> Packed:
        return tuple(float_matrix(weight if weight.dtype in FLOATS else weight.float()) for weight in weights)

    def quantize(self, weight: Tensor) -> KeptMatrix:
        return blocks.quantize(weight) if self.form == GGUF else groups.quantize(weight)

    def load(self, *stored: KeptMatrix) -> Packed:
        return tuple(map(kept_matrix, stored))

    def nbytes(self, outputs: int, inputs: int) -> int:
        return round(outputs * inputs * self.bytes_per_weight)


def kept_matrix(stored: KeptMatrix) -> Matrix:
    """What the library takes for it; nothing is copied."""
    if isinstance(stored, BlockMatrix):
        return block_matrix(stored.values.contiguous(), stored.kind)
    return group_matrix(*stored)


class KeptEmbedding(nn.Module):
    """ids [...] -> rows [..., d_model] in float32. The table is no parameter: it stays in the mapped file."""

    def __init__(self, stored: KeptMatrix) -> None:
        super().__init__()
        self.weight = stored.values
        self.matrix = kept_matrix(stored)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.long().contiguous()
        out = torch.empty(*ids.shape, self.matrix.inputs)
        function("dbrx_rows")(self.matrix, rows.data_ptr(), rows.numel(), out.data_ptr())
        return out
