"""What `test_cuda_kernels.py` runs under Triton's interpreter, or on a card; float64 by plain PyTorch answers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model import DbrxForCausalLM, packing
from model.checkpoint import expected_tensors
from model.formats import open_weights
from model.formats.write_quantized import Writer
from model.kernels import cuda_block, cuda_check, cuda_glu, cuda_linear
from model.kernels.cuda_block import CudaBlocks, decode_on_card
from model.kernels.cuda_glu import CudaGlu
from model.kernels.cuda_linear import BITS, CudaLinear
from model.kernels.cuda_norm import router_kernel
from model.kv_cache import KVCache
from model.quantization import dequantize, int4, int8
from model.transformer import EPS
from model.weights import FloatExpert, QuantizedMatrix
from tests.triton_interpreter import prepare
from tests.weights import make_checkpoint

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
}
FORMATS = [("int4", 32), ("int4", 128), ("int8", 0), ("bfloat16", 0)]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of infinities
TOLERANCE = 1e-5  # of the largest number: sums of some hundred products in float32

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    prepare()


def quantized(kernel: CudaLinear, floats: Tensor) -> tuple[QuantizedMatrix | None, Tensor]:
    """As the kernel stores floats, and the float64 that is meant."""
    if kernel.form == "bfloat16":
        return None, floats.bfloat16().double()
    stored = kernel.quantize(floats)
    meant = int4.dequantize(stored, kernel.group) if kernel.form == "int4" else int8.dequantize(stored)
    return stored, meant.double().cpu()


def agree(found: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    torch.testing.assert_close(
        found.double().cpu(), exact.cpu(), rtol=0, atol=TOLERANCE * float(exact.abs().max()) + 1e-30
    )


def linear(form: str, group: int) -> CudaLinear:
    kernel = CudaLinear(form, group, DEVICE)
    kernel.dtype = torch.float32
    return kernel


def check_linear(form: str, group: int, tokens: int, inputs: int, outputs: int) -> None:
    kernel = linear(form, group)
    stored, meant = quantized(kernel, torch.randn(outputs, inputs))
    packed = kernel.pack(meant.float()) if stored is None else kernel.load(stored)
    assert kernel.nbytes(outputs, inputs) == sum(part.nbytes for part in packed[:2]) - 4 * (form == "bfloat16")
    x = torch.randn(tokens, inputs)
    agree(kernel.run(kernel.prepare(x.to(DEVICE)), packed), x.double() @ meant.t())


@pytest.mark.parametrize(("form", "group"), FORMATS)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 550, 17), (20, 130, 17)])
def test_a_matrix(form: str, group: int, tokens: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(tokens)
    check_linear(form, group, tokens, inputs, outputs)


def test_matrices_one_above_the_other() -> None:
    torch.manual_seed(0)
    kernel = linear("int4", 32)
    (first, a), (second, b) = (quantized(kernel, torch.randn(n, 96)) for n in (5, 9))
    assert first is not None and second is not None
    x = torch.randn(2, 96)
    agree(kernel.run(kernel.prepare(x.to(DEVICE)), kernel.load(first, second)), x.double() @ torch.cat((a, b)).t())


@dataclass
class Experts:
    """A layer's experts as a kernel holds them, and in float64."""

    kernel: CudaGlu
    held: Any
    exact: list[list[Tensor]]  # w1, v1, and w2 by its outputs

    @classmethod
    def of(cls, form: str, group: int, count: int, hidden: int, d_model: int, activation: str = "silu") -> Experts:
        kernel = CudaGlu(linear(form, group), activation)
        packed, exact = [], []
        for _ in range(count):
            floats = FloatExpert(*(torch.randn(hidden, d_model) / d_model**0.5 for _ in range(3)))
            if form == "bfloat16":
                packed.append(kernel.pack(floats))
                exact.append([w.bfloat16().double() for w in (floats.w1, floats.v1, floats.w2.t())])
            else:
                stored = kernel.quantize(floats)
                packed.append(kernel.load(stored))
                turn = int8.dequantize if form == "int8" else lambda w, group=group: int4.dequantize(w, group)
                exact.append([turn(matrix).double().cpu() for matrix in stored])
        return cls(kernel, kernel.stack(packed), exact)

    def answer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum in float64, a token and an expert after the other."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for i, token in enumerate(x.double()):
            for expert, share in zip(ids[i].tolist(), weights[i].double(), strict=True):
                w1, v1, w2 = self.exact[expert]
                out[i] += share * (w2 @ (ACTIVATIONS[self.kernel.function](w1 @ token) * (v1 @ token)))
        return out

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.kernel.forward(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), self.held).cpu()

    def check(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        agree(self.forward(x, ids, weights), self.answer(x, ids, weights))


def choices(tokens: int, experts: int, top_k: int) -> Tensor:
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])


@pytest.mark.parametrize(("form", "group"), [FORMATS[0], *FORMATS[2:]])
def test_experts(form: str, group: int) -> None:
    """A number that is not finite reaches all of its own row, and no other."""
    torch.manual_seed(1)
    experts = Experts.of(form, group, 3, 38, 70)
    x, ids, weights = torch.randn(2, 70), torch.tensor([[0], [2]]), torch.rand(2, 1)
    x[1, 69] = torch.inf if form == "int8" else torch.nan
    found, exact = experts.forward(x, ids, weights), experts.answer(x, ids, weights)
    agree(found[:1], exact[:1])
    assert not found[1].isfinite().any()


def test_all_of_sixteen_experts_are_chosen() -> None:
    torch.manual_seed(2)
    Experts.of("bfloat16", 0, 16, 10, 34).check(torch.randn(4, 34), torch.randperm(16).view(4, 4), torch.rand(4, 4))


def test_one_expert_is_chosen_by_all() -> None:
    torch.manual_seed(3)
    experts = Experts.of("int4", 32, 3, 34, 66)
    experts.check(torch.randn(2, 66), torch.full((2, 1), 2), torch.rand(2, 1))
    experts.check(torch.randn(12, 66), choices(12, 3, 2), torch.rand(12, 2))  # too many for a decode step


@pytest.mark.parametrize("tokens", [2, 9])
def test_experts_that_lie_elsewhere_add_nothing(tokens: int) -> None:
    """Of the four the CPU holds the last two; a token that chose none of the others gets zeros."""
    torch.manual_seed(6)
    experts = Experts.of("int8", 0, 4, 18, 34)
    experts.held = experts.kernel.stack([*experts.held.experts[:2], (), ()])
    x, ids, weights = torch.randn(tokens, 34), choices(tokens, 4, 2), torch.rand(tokens, 2)
    ids[0] = torch.tensor([2, 3])
    agree(experts.forward(x, ids, weights), experts.answer(x, ids, weights * (ids < 2)))


@pytest.mark.parametrize(("form", "group"), FORMATS[:3])
def test_an_expert_leaves_the_card_as_it_came(form: str, group: int) -> None:
    torch.manual_seed(8)
    kernel = CudaGlu(linear(form, group), "silu")
    came = kernel.quantize(FloatExpert(*(torch.randn(18, 70) for _ in range(3))))
    left = kernel.stored(kernel.load(came))
    assert left is not None
    for one, other in zip(chain(*came), chain(*left), strict=True):
        assert (one is other is None) or torch.equal(one.cpu(), other)


@pytest.mark.parametrize(("form", "group"), FORMATS)
def test_numbers_that_are_not_finite_stay_in_their_row(form: str, group: int) -> None:
    torch.manual_seed(4)
    kernel = linear(form, group)
    _, meant = quantized(kernel, torch.randn(17, 70))
    packed, x = kernel.pack(meant.float()), torch.randn(4, 70)
    x[1, 3], x[2, 69] = torch.nan, torch.inf
    found = kernel.run((x.to(DEVICE),), packed).cpu()
    agree(found[::3], x[::3].double() @ torch.cat(list(kernel.floats(packed, torch.float32))).double().cpu().t())
    assert not found[1:3].isfinite().any()


@pytest.mark.parametrize(
    "first", [40, *(pytest.param(i, marks=pytest.mark.soak) for i in range(0, 100, 10) if i != 40)]
)
def test_random_shapes(first: int) -> None:
    """Twenty: a matrix and experts in turn. An interpreted program takes as long for few numbers as for many."""
    for seed in range(first, first + 10):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        form, group = draw.choice([*FORMATS, ("int4", 64), ("int4", 256)])
        most = 600 // BITS[form]
        check_linear(form, group, draw.randint(1, 10), 2 * draw.randint(1, most), draw.randint(1, 90))
        count, hidden, d_model = draw.randint(1, 8), 2 * draw.randint(1, 40), 2 * draw.randint(1, most)
        top_k = draw.randint(1, min(count, 3))
        tokens = draw.randint(1, 3 // top_k)
        experts = Experts.of(form, group, count, hidden, d_model, draw.choice(list(ACTIVATIONS)))
        experts.check(torch.randn(tokens, d_model), choices(tokens, count, top_k), torch.rand(tokens, top_k))


@pytest.mark.parametrize("order", [None, 1.0, 2.5])
def test_the_router(order: float | None) -> None:
    """With x + y, its norm, and experts that are as good as each other: the first of them is taken."""
    torch.manual_seed(5)
    x, y, weight, router = (torch.randn(shape) for shape in ((2, 70), (2, 70), (70,), (6, 70)))
    router[4] = router[1]
    residual, normed = torch.empty(2, 70, device=DEVICE), torch.empty(2, 16, 5, device=DEVICE)
    probabilities, weights = torch.empty(2, 6, device=DEVICE), torch.empty(2, 3, device=DEVICE)
    ids = torch.empty(2, 3, dtype=torch.int32, device=DEVICE)
    router_kernel[(2,)](
        *(each.to(DEVICE) for each in (x, y, weight, router)),
        *(residual, normed, probabilities, ids, weights),
        70,
        6,
        EPS,
        order or 1.0,
        TOP_K=3,
        NORMALIZE=order is not None,
        E=8,
        K=4,
        W=128,
        AT_ONCE=32,
        CHUNKS=5,
        BITS=8,
    )
    exact = functional.layer_norm(x.double() + y.double(), (70,), weight.double(), eps=EPS)
    agree(residual, x.double() + y.double())
    agree(normed.transpose(1, 2).reshape(2, 80), functional.pad(exact, (0, 10)))
    shares = (exact[:, None] * router.double()).sum(-1).softmax(-1)  # equal ones come out equal
    agree(probabilities, shares)
    best = shares.sort(descending=True, stable=True)
    assert torch.equal(ids.cpu().long(), best.indices[:, :3])
    chosen = best.values[:, :3]
    agree(weights, chosen if order is None else chosen / chosen.norm(p=order, dim=-1, keepdim=True))


CONFIG = {
    "d_model": 96,
    "n_heads": 6,
    "n_layers": 2,
    "vocab_size": 120,
    "max_seq_len": 128,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 16, "moe_top_k": 4},
}


def networks(
    form: str, group: int, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object
) -> tuple[DbrxForCausalLM, DbrxForCausalLM]:
    """A network whose steps are computed at once, and one of the floats that are meant."""
    stored = make_checkpoint(folder / "bfloat16", {**CONFIG, **changes}, 7)
    if form != "bfloat16":
        with open_weights(stored) as floats:
            Writer(floats, stored := folder / form, form, group or 32).write(lambda _: None)
    with open_weights(stored) as weights:
        plain = DbrxForCausalLM(weights.config).eval().to(DEVICE)
        plain.load_state_dict({name: weights.read(name).float() for name in expected_tensors(weights.config)})
    monkeypatch.setattr(packing, "choose", lambda name, group, device: linear(name, group or 0))
    monkeypatch.setattr(packing, "experts_of", CudaGlu)
    dtype = "bfloat16" if form == "bfloat16" else "float32"
    network = DbrxForCausalLM.from_pretrained(stored, dtype=dtype, pack=True).to(DEVICE)  # what is not packed
    network.transformer.set_kv_dtype(torch.float32)
    assert network.kernels is not None and "triton" in network.kernels.name and network.dtype == torch.float32
    decode_on_card(network)
    assert isinstance(network.transformer.at_once, CudaBlocks)
    return network, plain


@pytest.mark.soak
def test_a_step_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1, 37 and 64 tokens in blocks of 32: the first of a block, within one, and behind the last."""
    network, plain = networks("int8", 0, tmp_path, monkeypatch, n_layers=1)
    lengths = torch.tensor([1, 37, 64], device=DEVICE)
    ids = torch.arange(3 * 64, device=DEVICE).view(3, 64) % 120
    logits, routers = [], []
    with torch.inference_mode():
        for each in (network, plain):
            cache = KVCache(1, 3, block_tokens=32)
            there = torch.arange(64, device=DEVICE) < lengths[:, None]
            plain(ids, attention_mask=there, past_key_values=cache)
            new = torch.tensor([[7], [8], [9]], device=DEVICE)
            found = each(new, past_key_values=cache, output_router_logits=True)
            logits.append(found.logits)
            routers.append(found.router_logits[0])
            assert cache.lengths == [2, 38, 65]
    agree(logits[0], logits[1].double())
    agree(routers[0], routers[1].double())


def test_what_doctor_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel that there is; numbers that are off by a hundredth show."""
    found = list(cuda_check.compare(torch.device(DEVICE)))
    assert all(each.agrees for each in found), found
    there = {
        name for module in (cuda_block, cuda_glu, cuda_linear) for name in vars(module) if name.endswith("_kernel")
    }
    said = " ".join(each.kernels for each in found).replace(",", "").split()
    assert len(there) == 9 and {name.removesuffix("_kernel") for name in there} <= {*said}
    monkeypatch.setattr(cuda_check, "dequantize", lambda *stored: 1.01 * dequantize(*stored))
    found = list(cuda_check._products(linear("int8", 0), torch.Generator().manual_seed(0)))
    assert len(found) == 3 and not any(each.agrees for each in found)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("form", "group"), FORMATS)
def test_a_network(form: str, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and 40 tokens: the same as those of a network of the floats that are meant, in float32."""
    network, plain = networks(form, group, tmp_path, monkeypatch)
    prompt = torch.arange(40, 60, device=DEVICE)[None]
    assert torch.equal(
        network.generate(prompt, max_new_tokens=40, do_sample=False),
        plain.generate(prompt, max_new_tokens=40, do_sample=False),
    )
    with torch.inference_mode():
        for ids in (prompt, prompt[:, :5]):
            torch.testing.assert_close(network(ids).logits, plain(ids).logits, rtol=0, atol=1e-3)
