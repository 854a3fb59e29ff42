"""ggml's blocks out of floats, by the gguf package and `k_quants`, and floats out of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..weights import BlockMatrix
from . import k_quants


def quantize(weight: Tensor, kind: str = "Q8_0", squares: Tensor | None = None) -> BlockMatrix:
    """Floats [outputs, inputs] in blocks; `NotImplementedError` for a kind that nothing here can make.

    squares: mean squares of the inputs, to which K-quants are fitted.
    """
    import gguf

    floats = weight.float().contiguous()
    if kind in k_quants.KINDS:
        return BlockMatrix(k_quants.quantize(floats, kind, squares), kind)
    with np.errstate(all="ignore"):
        values = gguf.quantize(floats.numpy(), gguf.GGMLQuantizationType[kind])
    return BlockMatrix(torch.from_numpy(values), kind)


def dequantize(matrix: BlockMatrix) -> Tensor:
    """The float32 matrix [outputs, inputs] that is meant."""
    import gguf

    return torch.from_numpy(gguf.dequantize(matrix.values.numpy(), gguf.GGMLQuantizationType[matrix.kind]))
