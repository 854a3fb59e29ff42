"""One way to hold a matrix in memory and to multiply with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import ModelError

if TYPE_CHECKING:
    from ..formats import QuantizedMatrix

T = TypeVar("T")
Packed = tuple[Any, ...]  # a matrix as its kernel wants it; opaque to everybody else
Rows = tuple[Tensor, ...]  # prepared activations: the same rows of each tensor belong together


class MatrixKernel(Protocol):
    """A matrix [outputs, inputs] and its product with activations. Stateless: one object serves all matrices."""

    name: str  # what `doctor` and `bench` show
    quantization: str  # int8, int4, or "none"
    dtype: torch.dtype  # of the activations that go in and come out

    def pack(self, *weights: Tensor) -> Packed:
        """From floats [outputs, inputs], stacked one below the other; a copy."""

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        """Floats [outputs, inputs] as they are stored."""

    def load(self, *stored: QuantizedMatrix) -> Packed:
        """From stored matrices, stacked one below the other; a copy."""

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a packed matrix."""

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        """Activations [n, inputs], ready for any number of products. inner: what an expert computes before w2."""

    def run(self, x: Rows, packed: Packed) -> Tensor:
        """Prepared rows times the matrix: [rows, outputs]."""

    def each(self, x: Tensor, matrices: Sequence[Packed]) -> Tensor:
        """Row i of x [n, inputs] times matrix i, or a lone row times each: [len(matrices), outputs].

        A decode step in as few operations as can be: there, what lies between the products takes as long as they do.
        """


class QuantizedFirst:
    """`pack` of kernels that hold few bits a weight."""

    def pack(self: MatrixKernel, *weights: Tensor) -> Packed:
        return self.load(*map(self.quantize, weights))


class RowByRow:
    """`each` for kernels in which rows share nothing."""

    def each(self: MatrixKernel, x: Tensor, matrices: Sequence[Packed]) -> Tensor:
        rows = [self.prepare(row) for row in torch.split(x, 1)]
        return torch.cat([self.run(row, packed) for row, packed in paired(rows, matrices)])


def paired(rows: Sequence[T], matrices: Sequence[Packed]) -> Iterable[tuple[T, Packed]]:
    """Row i and matrix i, or a lone row and each matrix."""
    return zip(repeat(rows[0], len(matrices)) if len(rows) == 1 else rows, matrices, strict=True)


def check_scales(parts: Iterable[QuantizedMatrix]) -> None:
    """`ModelError` if a scale is not finite."""
    if not all(bool(part.scale.isfinite().all()) for part in parts):
        raise not_finite()


def not_finite() -> ModelError:
    """What a matrix with NaN or infinity in it is refused with: products of bytes would hide them."""
    return ModelError(
        "the weights hold numbers that are not finite", "check the files with `dbrx download MODEL --verify`"
    )
