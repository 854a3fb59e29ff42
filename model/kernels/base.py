"""The contract of kernels: how matrices and experts lie in memory, and the products with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..quantization import is_finite, not_finite

if TYPE_CHECKING:
    from ..weights import FloatExpert, QuantizedExpert, QuantizedMatrix

T = TypeVar("T")
CPU = torch.device("cpu")
Packed = tuple[Any, ...]  # a matrix or an expert as its kernel wants it; opaque to everybody else
Rows = tuple[Tensor, ...]  # prepared activations: the same rows of each tensor belong together


class LinearKernel(Protocol):
    """A matrix [outputs, inputs] and its product with activations. Stateless: one object serves all matrices."""

    name: str  # what `doctor` and `bench` show
    quantization: str  # a key of `SCHEMES`, one of `KEPT`, or "none"
    group: int  # inputs that share a scale, where the scheme has groups
    dtype: torch.dtype  # of the activations that go in and come out
    keeps_nan: bool  # whether numbers that are not finite come out as such
    device: torch.device  # where it computes

    def pack(self, *weights: Tensor) -> Packed:
        """From floats [outputs, inputs], stacked one below the other; where it reads them as they lie, no copy."""

    def quantize(self, weight: Tensor) -> Any:
        """Floats [outputs, inputs] as they are stored, for `load`."""

    def load(self, *stored: Any) -> Packed:
        """From stored matrices: of `KEPT` `KeptMatrix`, of others `QuantizedMatrix`."""

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a packed matrix."""

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        """Activations [n, inputs], ready for any number of products. inner: what an expert computes before w2."""

    def run(self, x: Rows, packed: Packed) -> Tensor:
        """Prepared rows times the matrix: [rows, outputs]."""

    def each(self, x: Tensor, matrices: Sequence[Packed]) -> Tensor:
        """Row i of x [n, inputs] times matrix i, or a single row times each: [len(matrices), outputs].

        A decode step in as few operations as can be: there, what lies between the products takes as long as they do.
        """


class GluExpertKernel(Protocol):
    """One way to hold an expert and to compute with it. Without state of a layer: one object serves them all."""

    name: str  # what `doctor` and `bench` show
    quantization: str  # the stored form that `load` takes, a key of `SCHEMES` or one of `KEPT`; "none" has no `load`
    reads_stored: bool  # packed, an expert is what is stored, where it lies: `pack` and `load` copy nothing

    def pack(self, expert: FloatExpert) -> Packed:
        """Quantize or reorder an expert; never a view of what it was made from, unless the kernel reads floats."""

    def quantize(self, expert: FloatExpert) -> QuantizedExpert:
        """An expert as it is stored."""

    def load(self, stored: Any) -> Packed:
        """From an expert that is stored quantized: of `KEPT` a `KeptExpert`, of others a `QuantizedExpert`."""

    def stored(self, packed: Packed) -> QuantizedExpert | None:
        """What `load` made it of, for another kernel, in the CPU's memory; None where that is not kept."""

    def nbytes(self, hidden: int, d_model: int, itemsize: int) -> int:
        """Bytes of a packed expert of that size; itemsize: of the floats it is packed from."""

    def prepare(self, x: Tensor) -> Any:
        """What all experts of a layer share of x [n, d_model], such as its quantized form: once a layer."""

    def stack(self, experts: Sequence[Packed]) -> Any:
        """All experts of a layer, as `forward` takes them; one that lies elsewhere is (), and adds nothing."""

    def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor, held: Any) -> Tensor:
        """x [n, d_model], expert_ids and router_weights [n, top_k] -> [n, d_model], the weighted sum."""

    def run(self, prepared: Any, rows: Tensor | None, packed: Packed) -> Tensor:
        """The expert's output [len(rows), d_model] for those rows of x (None: all), in the dtype of x."""

    def each(self, x: Tensor, experts: Sequence[Packed]) -> Tensor:
        """Every expert's output for the one row x [1, d_model]: [len(experts), d_model], in the dtype of x.

        An expert's numbers do not depend on those beside it.
        """


class QuantizedFirst:
    """`pack` of kernels that hold few bits a weight."""

    keeps_nan = False  # products of bytes are bytes
    device = CPU

    def pack(self: LinearKernel, *weights: Tensor) -> Packed:
        return self.load(*map(self.quantize, weights))


class RowByRow:
    """`each` for kernels in which rows share nothing."""

    def each(self: LinearKernel, x: Tensor, matrices: Sequence[Packed]) -> Tensor:
        rows = [self.prepare(row) for row in torch.split(x, 1)]
        return torch.cat([self.run(row, packed) for row, packed in paired(rows, matrices)])


class OneByOne:
    """`each` for kernels that gain nothing from several experts at once."""

    def each(self: GluExpertKernel, x: Tensor, experts: Sequence[Packed]) -> Tensor:
        prepared = self.prepare(x)
        return torch.cat([self.run(prepared, None, packed) for packed in experts])


def paired(rows: Sequence[T], matrices: Sequence[Packed]) -> Iterable[tuple[T, Packed]]:
    """Row i and matrix i, or a single row and each matrix."""
    return zip(repeat(rows[0], len(matrices)) if len(rows) == 1 else rows, matrices, strict=True)


def check_scales(parts: Iterable[QuantizedMatrix]) -> None:
    """`ModelError` if a scale or a zero point is not finite."""
    for _, *ranges in parts:
        if not all(is_finite(numbers) for numbers in ranges if numbers is not None):
            raise not_finite()
