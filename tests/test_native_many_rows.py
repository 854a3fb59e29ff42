"""Native products of many rows, and quantizing, against float64 and the modules in Python."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from model import native
from model.native.abi import Matrix
from model.native.tensors import Experts, matrix
from model.quantization import int4, int8
from model.weights import QuantizedMatrix

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs native kernels: python -m model.native")
FORMATS = ("float32", "bfloat16", "int8", "int4")


def call(name: str, *arguments: object) -> None:
    library = native.library()
    assert library is not None
    getattr(library, name)(*arguments)  # raises what the library says


def made(kind: str, weight: Tensor, transposed: bool = False) -> tuple[Matrix, Tensor]:
    """A matrix [outputs, inputs] in a format, and what it means in float64."""
    if kind == "int8":
        stored = int8.quantize(weight)
        return matrix(stored.values, stored.scale), int8.dequantize(stored).double()
    if kind == "int4":
        stored = int4.quantize(weight)
        return matrix(*stored, group=int4.GROUP), int4.dequantize(stored).double()
    weight = weight.to(getattr(torch, kind))
    return matrix((weight.t() if transposed else weight).contiguous(), transposed=transposed), weight.double()


# Activations have 16 bits where integers of 16 bits are multiplied, and 8 where bytes are.
IN_BYTES = native.status().variant in ("avx512", "neon")
CLOSE = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 2e-2 if IN_BYTES else 1e-2, "int4": 1e-2}


def multiplied(pool: native.Pool, weights: Matrix, x: Tensor) -> Tensor:
    y = torch.empty(len(x), weights.outputs)
    call("dbrx_linear", pool.handle, weights, x.data_ptr(), len(x), y.data_ptr())
    return y


@pytest.mark.parametrize("kind", FORMATS)
def test_many_rows_are_products(kind: str) -> None:
    torch.manual_seed(0)
    pool = native.pool(2)
    for outputs, inputs, n in ((37, 70, 19), (96, 1040, 600)):
        x = torch.randn(n, inputs)
        x[1, 3] = 40  # far out: 8 bits alone would lose the rest of the row
        weights, meant = made(kind, torch.randn(outputs, inputs))
        y, exact = multiplied(pool, weights, x), x.double() @ meant.t()
        off = (y - exact).norm(dim=1) / exact.norm(dim=1)
        assert off.max() < CLOSE[kind]
        assert off[1] < 3e-3
        assert torch.equal(multiplied(pool, weights, x[:17]), y[:17])  # whatever rows are beside


@pytest.mark.parametrize(("kind", "transposed"), [(kind, False) for kind in FORMATS] + [("bfloat16", True)])
def test_many_rows_of_experts(kind: str, transposed: bool) -> None:
    torch.manual_seed(0)
    experts, d, hidden, n, top_k = 5, 70, 90, 60, 2
    sides = ((hidden, d), (hidden, d), (d, hidden))
    parts = [
        [made(kind, torch.randn(*side) / 8, transposed and side[0] == d) for side in sides] for _ in range(experts)
    ]
    held = Experts([(w1[0], v1[0], w2[0]) for w1, v1, w2 in parts])
    x = torch.randn(n, d)
    router_weights, ids = torch.randn(n, experts).softmax(-1).topk(top_k)
    ids = ids.int()
    exact = x.double()
    for i, ((_, w1), (_, v1), (_, w2)) in enumerate(parts):
        inner = torch.nn.functional.silu(x.double() @ w1.t()) * (x.double() @ v1.t())
        exact = exact + (inner @ w2.t()) * (router_weights * (ids == i)).sum(1, keepdim=True)

    def run(threads: int) -> Tensor:
        out, addresses = x.clone(), [t.data_ptr() for t in (x, ids, router_weights)]
        pool = native.pool(threads)
        call(
            "dbrx_experts", pool.handle, held.array, experts, 0, experts, 0, addresses[0], n, *addresses[1:], top_k,
            out.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    out = run(2)
    assert torch.equal(out, run(1))
    assert ((out - exact).norm() / exact.norm()) < (1e-6 if kind == "float32" else 4e-2 if IN_BYTES else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_quantizing_gives_the_numbers_of_the_modules(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    pool = native.pool(2)
    for outputs, inputs in ((37, 130), (64, 1000), (3, 66)):
        weight = torch.randn(outputs, inputs).to(dtype)
        rows, columns = torch.rand(outputs) + 0.5, torch.rand(inputs) + 0.5
        source = matrix((weight.t() if transposed else weight).contiguous(), transposed=transposed)
        values, scale = torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs)
        factors = rows.data_ptr(), columns.data_ptr()
        call("dbrx_quantize", pool.handle, source, *factors, ctypes.byref(matrix(values, scale)))
        floats = weight.float() * rows[:, None] * columns
        wanted = int8.quantize(floats)
        assert torch.equal(values, wanted.values) and torch.equal(scale, wanted.scale)
        for group in (32, 128):
            groups = -(-inputs // group)
            found = QuantizedMatrix(
                torch.empty(outputs, inputs // 2, dtype=torch.uint8),
                *(torch.empty(outputs, groups, dtype=torch.bfloat16) for _ in range(2)),
            )
            call("dbrx_quantize", pool.handle, source, *factors, ctypes.byref(matrix(*found, group=group)))
            wanted = int4.quantize(floats, group)
            # A fit of other sums may end at other levels, as good ones.
            levels, others = int4.unpack(found.values), int4.unpack(wanted.values)
            assert (levels == others).float().mean() > 0.99
            errors = [(int4.dequantize(each, group) - floats).square().sum() for each in (found, wanted)]
            assert errors[0] < 1.002 * errors[1]


def test_what_is_not_finite_is_not_quantized() -> None:
    weight = torch.randn(4, 64)
    weight[2, 5] = torch.inf
    values, scale = torch.empty(4, 64, dtype=torch.int8), torch.empty(4)
    pool = native.pool(1)
    call("dbrx_quantize", pool.handle, matrix(weight), None, None, ctypes.byref(matrix(values, scale)))
    assert not scale[2].isfinite()
    parts = torch.empty(4, 32, dtype=torch.uint8), *(torch.empty(4, 2, dtype=torch.bfloat16) for _ in range(2))
    with pytest.raises(ValueError, match="not finite"):
        call("dbrx_quantize", pool.handle, matrix(weight), None, None, ctypes.byref(matrix(*parts, group=32)))
