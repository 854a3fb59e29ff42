"""int4 weights by PyTorch: its own product in bfloat16, or floats again at each product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..quantization.int4 import GROUP, dequantize, quantize, unpack
from ..weights import QuantizedMatrix
from .base import Packed, QuantizedFirst, RowByRow, Rows, check_scales
from .upcast import linear


class Int4(QuantizedFirst):
    """What kernels for such matrices share. group: inputs that share scale and zero point."""

    quantization = "int4"

    def __init__(self, group: int = GROUP) -> None:
        self.group = group

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        return quantize(weight, self.group)

    def nbytes(self, outputs: int, inputs: int) -> int:
        groups = -(-inputs // self.group)
        return outputs * groups * (self.group // 2 + 4)


class AtenInt4(Int4, RowByRow):
    """PyTorch's own product with 4-bit weights, in bfloat16."""

    name = "int4 aten"
    dtype = torch.bfloat16

    def load(self, *stored: QuantizedMatrix) -> Packed:
        levels = torch.cat([unpack(part.values) for part in stored]).int()
        levels = pad(levels, (0, -levels.shape[1] % self.group))
        check_scales(stored)
        matrix = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        scale = torch.cat([part.scale for part in stored]).float()
        zero = torch.cat([part.zero for part in stored if part.zero is not None]).float()
        # The kernel computes (level - 8) * scale + base.
        ranges = torch.stack((scale, (8 - zero) * scale), dim=-1)
        return matrix, ranges.transpose(0, 1).to(torch.bfloat16).contiguous()

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        x = x.to(torch.bfloat16)
        return (pad(x, (0, -x.shape[1] % self.group)) if x.shape[1] % self.group else x,)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x[0], packed[0], self.group, packed[1])
        return out


class PlainInt4(Int4, RowByRow):
    """Floats again at each product: slow, for shapes and processors that nothing else is made for."""

    name = "int4 plain"
    dtype = torch.float32

    def load(self, *stored: QuantizedMatrix) -> Packed:
        check_scales(stored)
        return tuple(QuantizedMatrix(*(part.clone() for part in matrix if part is not None)) for matrix in stored)

    def nbytes(self, outputs: int, inputs: int) -> int:
        groups = -(-inputs // self.group)
        return outputs * (inputs // 2 + 4 * groups)

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        return (x.float(),)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        return torch.cat([linear(x[0], dequantize(matrix, self.group)) for matrix in packed], dim=1)
