"""int4 weights by PyTorch: its own product in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..quantization.int4 import GROUP, quantize, unpack
from ..weights import QuantizedMatrix
from .base import Packed, QuantizedFirst, RowByRow, Rows, check_scales


class AtenInt4(QuantizedFirst, RowByRow):
    """PyTorch's own product with 4-bit weights. group: inputs that share scale and zero point."""

    name = "int4 aten"
    quantization = "int4"
    dtype = torch.bfloat16

    def __init__(self, group: int = GROUP) -> None:
        self.group = group

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        return quantize(weight, self.group)

    def nbytes(self, outputs: int, inputs: int) -> int:
        groups = -(-inputs // self.group)
        return outputs * groups * (self.group // 2 + 4)

    def load(self, *stored: QuantizedMatrix) -> Packed:
        quantized = torch.cat([unpack(part.values) for part in stored]).int()
        quantized = pad(quantized, (0, -quantized.shape[1] % self.group))
        check_scales(stored)
        matrix = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized, 1)
        scale = torch.cat([part.scale for part in stored]).float()
        zero = torch.cat([part.zero for part in stored if part.zero is not None]).float()
        # The kernel computes (quantized - 8) * scale + base.
        ranges = torch.stack((scale, (8 - zero) * scale), dim=-1)
        return matrix, ranges.transpose(0, 1).to(torch.bfloat16).contiguous()

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        x = x.to(torch.bfloat16)
        return (pad(x, (0, -x.shape[1] % self.group)) if x.shape[1] % self.group else x,)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x[0], packed[0], self.group, packed[1])
        return out
