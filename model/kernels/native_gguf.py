"""Products of the native library with weights in a GGUF file's blocks, and rows of an embedding that lies in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..native.tensors import block_matrix
from ..quantization import GGUF, blocks
from ..weights import BlockMatrix
from .base import Packed
from .native_call import FLOATS, float_matrix, function
from .native_linear import NativeProducts


class NativeGguf(NativeProducts):
    """Matrices in blocks as they lie in the file; `pack` holds floats, for what a file has in no blocks.

    bytes_per_weight: of the matrices of a file, on average.
    """

    def __init__(self, bytes_per_weight: float = 34 / 32) -> None:
        self.bytes_per_weight = bytes_per_weight
        self.form = self.quantization = GGUF
        self.group = 0
        self.name = "gguf native"

    def pack(self, *weights: Tensor) -> Packed:
        return tuple(float_matrix(weight if weight.dtype in FLOATS else weight.float()) for weight in weights)

    def quantize(self, weight: Tensor) -> BlockMatrix:
        return blocks.quantize(weight)

    def load(self, *stored: BlockMatrix) -> Packed:
        return tuple(block_matrix(each.values.contiguous(), each.kind) for each in stored)

    def nbytes(self, outputs: int, inputs: int) -> int:
        return round(outputs * inputs * self.bytes_per_weight)


class BlockEmbedding(nn.Module):
    """ids [...] -> rows [..., d_model] in float32. The table is no parameter: it stays in the mapped file."""

    def __init__(self, stored: BlockMatrix) -> None:
        super().__init__()
        self.weight = stored.values
        self.matrix = block_matrix(stored.values, stored.kind)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.long().contiguous()
        out = torch.empty(*ids.shape, self.matrix.inputs)
        function("dbrx_rows")(self.matrix, rows.data_ptr(), rows.numel(), out.data_ptr())
        return out
