"""Products of many rows in integers: near the products of floats, whatever the rows and weights are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.compiled import block
from model.compiled.block import CompiledLinear
from model.compiled.products import FloatProduct, Matrix, NibbleProduct, Product, ShortProduct, integers
from model.compiled.tiles import OUTPUTS, ROWS, multiply
from model.quantization import PackedLinear, int4, int8
from model.quantization.nibbles import NibbleRows
from model.quantization.rows import FloatRows

HELD = ["floats", "bytes", "nibbles"]
SHAPES = [(12, 48), (6, 4096), (8, 46), (4, 160)]


def held(kind: str, weight: Tensor) -> tuple[Product, Matrix, Tensor]:
    """A product, the matrix as it takes it, and the numbers that are meant."""
    if kind == "floats":
        return FloatProduct(), (weight.bfloat16(),), weight.bfloat16().double()
    if kind == "nibbles":
        nibbles = int4.quantize(weight, 32)
        return NibbleProduct(32), NibbleRows(32).load(nibbles), int4.dequantize(nibbles, 32).double()
    stored = int8.quantize(weight)
    return ShortProduct(), stored[:2], int8.dequantize(stored).double()


def product_of(kind: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is found, what is meant, and the product of the norms of each row and each output."""
    product, matrix, meant = held(kind, weight)
    found = multiply(integers(product.ordered(x)), product.weights(matrix))
    return found, x.double() @ meant.t(), x.double().norm(dim=1)[:, None] * meant.norm(dim=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", HELD)
def test_as_near_as_steps_allow(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3 * ROWS, shape[1]), torch.randn(shape)
    x[1] *= 1e4
    x[2] *= 1e-6
    x[3, 5] = 1000  # beside which all others have few steps
    x[4] = 0
    weight[1] *= 100
    found, exact, norms = product_of(kind, x, weight)
    assert found.dtype == torch.float32 and found.is_contiguous()
    # Half a step an input, in either factor, adds up as a random walk does: 1 / 32,000 / sqrt(12) of the other's norm.
    # A norm of nibbles is bounded, not known: up to four times as large.
    assert ((found - exact).abs() <= (2e-4 if kind == "nibbles" else 1e-4) * norms).all()
    assert not found[4].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", HELD)
def test_the_largest_sums_fit(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).sign()
    weight[0] = 0
    weight[0, 7] = 1
    x = torch.cat((weight[:OUTPUTS], -weight[:OUTPUTS]))  # parallel to what they meet
    found, exact, norms = product_of(kind, x, weight)
    assert ((found - exact).abs() <= 1e-3 * norms).all()
    assert (exact.abs() / norms).max() > 0.99


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", HELD)
def test_numbers_that_are_not_finite_stay_in_their_row(kind: str, bad: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, 64)
    x[1, 9] = bad
    found, *_ = product_of(kind, x, torch.randn(8, 64))
    assert not found[1].isfinite().any()
    assert found[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_a_large_matrix_goes_in_pieces(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(block, "PIECE", 16 * 5)
    weight, x, asked = torch.randn(14, 16), torch.randn(16, rows).t(), []

    def function(tensors: list[Tensor]) -> list[Tensor]:
        assert all(tensor.is_contiguous() for tensor in tensors)
        asked.append((len(tensors[0]), len(tensors[1])))
        return [tensors[0] @ tensors[1].t()]

    kernel = FloatRows(torch.float32)
    linear = CompiledLinear(PackedLinear(kernel, (weight,)), function, ROWS)  # type: ignore[arg-type]  # lists only
    torch.testing.assert_close(linear(x), x @ weight.t())
    assert asked == ([] if rows == 1 else [(-(-rows // ROWS) * ROWS, outputs) for outputs in (4, 4, 4, 2)])
