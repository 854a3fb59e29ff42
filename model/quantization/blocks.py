"""ggml's blocks: what the gguf package makes of floats, and floats of that."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import BlockMatrix


def quantize(weight: Tensor, kind: str = "Q8_0") -> BlockMatrix:
    """Floats [outputs, inputs] in blocks; `NotImplementedError` for a kind that the package cannot make."""
    import gguf

    values = gguf.quantize(weight.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind])
    return BlockMatrix(torch.from_numpy(values), kind)


def dequantize(matrix: BlockMatrix) -> Tensor:
    """The float32 matrix [outputs, inputs] that is meant."""
    import gguf

    return torch.from_numpy(gguf.dequantize(matrix.values.numpy(), gguf.GGMLQuantizationType[matrix.kind]))
