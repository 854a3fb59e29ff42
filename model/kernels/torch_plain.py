"""Weights of any scheme by PyTorch: floats again at each product."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantization import SCHEMES, dequantize, quantize
from ..weights import QuantizedMatrix
from .base import Packed, QuantizedFirst, RowByRow, Rows, check_scales
from .upcast import linear


class PlainKernel(QuantizedFirst, RowByRow):
    """Slow, for shapes and processors that nothing else is made for. group: inputs that share a scale."""

    dtype = torch.float32

    def __init__(self, scheme: str, group: int = 0) -> None:
        self.name, self.quantization = f"{scheme} plain", scheme
        self.group = group or SCHEMES[scheme].group

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        return quantize(self.quantization, self.group, weight)

    def load(self, *stored: QuantizedMatrix) -> Packed:
        check_scales(stored)
        return tuple(QuantizedMatrix(*(part.clone() for part in matrix if part is not None)) for matrix in stored)

    def nbytes(self, outputs: int, inputs: int) -> int:
        return SCHEMES[self.quantization].nbytes(self.group, outputs, inputs)

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        return (x.float(),)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        products = [linear(x[0], dequantize(self.quantization, matrix, self.group)) for matrix in packed]
        return torch.cat(products, dim=1)
