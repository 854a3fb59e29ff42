"""What compiled experts compute of many rows, and on which cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Barrier, get_ident
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model import quantization
from model.compiled.block import AT_ONCE, CompiledExperts
from model.compiled.call import Function
from model.compiled.cores import LEAST, side_by_side
from model.compiled.functions import Expert
from model.compiled.many import Blocks, Bytes, Floats, Many, Tiles
from model.compiled.products import FloatProduct, ShortProduct
from model.compiled.tiles import ROWS
from model.config import DbrxConfig, DbrxFFNConfig
from model.errors import ModelError
from model.experts import MatricesKernel, PackedExperts
from model.formats import FloatExpert
from model.quantization import MatrixKernel
from model.quantization.blocks import FloatBlocks
from model.quantization.rows import ByteRows, FloatRows, OneDnnByteRows
from model.quantization.widened import multiplies_bfloat16

WAYS: dict[str, tuple[MatrixKernel, Many, int]] = {
    "bytes": (OneDnnByteRows(), Bytes(), 1),
    "tiles of bytes": (ByteRows(), Tiles(ShortProduct()), ROWS),
    "floats": (FloatRows(torch.bfloat16), Floats(), 1),
    "blocks": (FloatBlocks(), Blocks(), 1),
    "tiles of floats": (FloatRows(torch.bfloat16), Tiles(FloatProduct()), ROWS),
}


@pytest.mark.parametrize("peaked", ["none", "some", "all"])
@pytest.mark.parametrize("n", [2, 37, AT_ONCE + 5])
@pytest.mark.parametrize("name", WAYS)
def test_experts_of_many_rows(name: str, n: int, peaked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("floats", "blocks") and not multiplies_bfloat16():
        pytest.skip("not on this CPU")
    monkeypatch.setattr(quantization.rows, "multiplies_bytes", lambda: True)  # slowly, where the processor does not
    torch.manual_seed(0)
    (matrices, way, multiple), ffn = WAYS[name], DbrxFFNConfig(moe_num_experts=16, moe_top_k=4)
    experts = [FloatExpert(*(torch.randn(128, 64) / 8 for _ in range(3))) for _ in range(16)]
    if peaked != "none":
        for expert in experts:
            expert.w1[5] *= 100 if peaked == "all" else 3  # the hidden activations' extreme
    x = torch.randn(n, 64).clamp(-2, 2)
    x[{"none": slice(0), "some": slice(None, None, 3), "all": slice(None)}[peaked], 7] = 60
    x = x.to(matrices.dtype)
    chosen = torch.rand(n, 15).topk(4).indices  # one expert computes nothing
    weights = torch.rand(n, 4).to(x.dtype)
    kernel = MatricesKernel(matrices, functional.silu)
    held = PackedExperts(kernel, [kernel.pack(expert) for expert in experts])
    function = Expert(DbrxConfig(ffn_config=ffn), way)
    functions: dict[str, Function] = {"experts": lambda a: [], "expert": lambda a: [function(*grouped(a, held))]}
    found = CompiledExperts(held, functions, multiple)
    found.few = 0
    exact = torch.zeros(n, 64, dtype=torch.double)
    for e, (w1, v1, w2) in enumerate(experts):
        hidden = functional.silu(x.double() @ w1.t().double()) * (x.double() @ v1.t().double())
        exact += hidden @ w2.double() * (weights * (chosen == e)).sum(1, dtype=torch.double)[:, None]
    bound = (held(x, chosen, weights) - exact).norm()
    within = 1.5 if n == 2 else 1.1  # errors of few numbers differ more
    assert (found(x, chosen, weights) - exact).norm() <= within * bound < 0.05 * exact.norm()


def grouped(arguments: Sequence[Tensor], held: PackedExperts) -> list[Any]:
    """Arguments of `Expert`, the parts of each matrix together."""
    first, second = held.experts[0]
    size = len(second)
    assert len(first) == 2 * size
    matrices = arguments[4:]
    return [*arguments[:4], *(tuple(matrices[i : i + size]) for i in range(0, 3 * size, size))]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_jobs_run_side_by_side_on_a_core_each() -> None:
    both, seen = Barrier(2), []

    def job(_: int) -> None:
        both.wait(30)  # each is there while another is
        seen.append((get_ident(), torch.get_num_threads()))

    side_by_side(job, range(2 * LEAST))
    assert len({ident for ident, _ in seen}) == 2 and {cores for _, cores in seen} == {1}
    assert torch.get_num_threads() == 2
    seen.clear()
    both = Barrier(1)
    side_by_side(job, range(2 * LEAST - 1))
    assert seen == [(get_ident(), 2)] * (2 * LEAST - 1)  # too few: with both cores each


@pytest.mark.usefixtures("two_threads")
def test_what_a_job_raises_is_raised() -> None:
    def job(i: int) -> None:
        if i == 3:
            raise ModelError("three")

    with pytest.raises(ModelError, match="three"):
        side_by_side(job, range(2 * LEAST))
