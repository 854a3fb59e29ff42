"""Products of any weights: made wider a piece at a time, where the processor multiplies them slowly or not at all."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

FEW = 8  # rows that PyTorch's own product of bfloat16 weights row by row takes as long for as to widen them
PIECE = 2**20  # weights that are made wider at once: they stay in the processor's cache


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this type are computed in float32 there: of bfloat16, up to 100 times as fast."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16()


@cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN does on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, inputs], weight [outputs, inputs] of any type -> [n, outputs] in the dtype of x."""
    wide = torch.float32 if widens(x.dtype, x.device) else x.dtype
    if weight.dtype == x.dtype and (wide == x.dtype or len(x) < FEW):
        return functional.linear(x, weight)
    rows, pieces = x.to(wide), torch.split(weight, max(1, PIECE // weight.shape[1]))
    return torch.cat([functional.linear(rows, piece.to(wide)) for piece in pieces], dim=1).to(x.dtype)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, inputs], weight [inputs, outputs] in the same dtype -> [n, outputs] in it too."""
    if not widens(x.dtype, x.device):
        return torch.matmul(x, weight)
    inputs = max(1, PIECE // weight.shape[1])
    out = torch.zeros(len(x), weight.shape[1], device=x.device)
    for part, piece in zip(torch.split(x, inputs, dim=1), torch.split(weight, inputs), strict=True):
        out = torch.addmm(out, part.float(), piece.float())
    return out.to(x.dtype)
