"""Products of any weights: upcast a piece at a time, where the processor multiplies them slowly or not at all.

They are computed column by column, weights times rows: for 16 to 128 rows MKL's float32 is 1.2 to 2 times as fast as
with rows times weights. So what comes out is not contiguous, which is for its readers to know.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

UPCAST_ROWS = 8  # rows that PyTorch's own product of bfloat16 weights row by row takes as long for as to upcast them
PIECE = 2**20  # weights that are upcast at once: they stay in the processor's cache


def upcasts(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this type are computed in float32 there: of bfloat16, up to 100 times as fast."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16()


@cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN does on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """x [n, inputs], weights [outputs, inputs] of any type, one below the other -> [n, outputs] in the dtype of x."""
    wide = torch.float32 if upcasts(x.dtype, x.device) else x.dtype
    if weights[0].dtype == x.dtype and (wide == x.dtype or len(x) < UPCAST_ROWS):
        products = [functional.linear(x, weight) for weight in weights]
        return torch.cat(products, dim=1) if len(products) > 1 else products[0]
    columns, outputs = x.to(wide).t(), max(1, PIECE // x.shape[1])
    pieces = (piece for weight in weights for piece in torch.split(weight, outputs))
    return torch.cat([torch.mm(piece.to(wide), columns) for piece in pieces]).t().to(x.dtype)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, inputs], weight [inputs, outputs] in the same dtype -> [n, outputs] in it too."""
    if not upcasts(x.dtype, x.device):
        return torch.matmul(x, weight)
    inputs = max(1, PIECE // weight.shape[1])
    out = torch.zeros(weight.shape[1], len(x), device=x.device)
    for part, piece in zip(torch.split(x, inputs, dim=1), torch.split(weight, inputs), strict=True):
        out.addmm_(piece.float().t(), part.float().t())
    return out.t().to(x.dtype)
