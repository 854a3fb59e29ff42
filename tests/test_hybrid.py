"""Experts in two places, with the CPU in the card's: the same tokens, and only activations cross between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from dbrx_cli.repl.phrases import card_in_words
from model import DbrxForCausalLM
from model.config import DbrxConfig, official
from model.errors import ResourceError
from model.experts import Bus, HybridExperts, PackedExperts
from model.formats import open_weights
from model.formats.write_quantized import Writer
from model.kernels import experts_of, kernel_facts
from model.kernels.registry import KERNELS
from model.kernels.torch_plain import PlainKernel
from model.load_layout import ARRIVING
from model.load_plan import LoadOptions, LoadPlan, Stored
from model.load_planner import plan_load
from model.machine import parse_devices
from model.placement import Device, KernelFacts, Machine, capacity
from model.speed import tokens_per_s
from model.weights import FloatExpert
from tests.weights import make_checkpoint

LAYERS, D_MODEL, EXPERTS, TOP_K = 3, 64, 16, 4
CONFIG: dict[str, Any] = {
    "d_model": D_MODEL, "n_heads": 4, "n_layers": LAYERS, "vocab_size": 200, "max_seq_len": 512,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 500000, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
}  # fmt: skip
SPLITS = {"all on the card": 48, "uneven": 20, "one layer has none": 2, "none on the card": 0}


def as_card(form: str, group: int | None, device: str) -> KernelFacts | None:
    """The CPU's kernels, in the place of a card's."""
    return kernel_facts(form, group, form)


def machine_with(memory: int) -> Machine:
    card = Device("cpu:0", memory, 1e12, 25e9)  # PyTorch takes it for the CPU
    return Machine((card,), Device("cpu", 2**30, 5e10), Device("disk", 0, 3e9), kernel_facts, as_card)


@pytest.fixture(scope="module", params=["int8", "int4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid")
    with open_weights(make_checkpoint(path / "floats", CONFIG, 11)) as floats:
        Writer(floats, path / request.param, request.param, 32).write(lambda _: None)
    return path / str(request.param)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> list[int]:
    """Of the network in one place."""
    alone = DbrxForCausalLM.from_pretrained(folder, pack=True)
    assert alone.on_card() is None
    return greedy(alone)


def load(folder: Path, on_card: int, monkeypatch: pytest.MonkeyPatch) -> DbrxForCausalLM:
    """With room for so many experts on the card, to the byte."""
    with open_weights(folder) as weights:
        plenty = plan_load(weights.config, Stored.of(weights), machine_with(2**40), LoadOptions(device_map="auto"))
    room = 2**40 - plenty.free(plenty.machine.gpus[0]) - plenty.sizes.expert * (EXPERTS * LAYERS - on_card)
    room += plenty.sizes.expert * ARRIVING * (on_card < EXPERTS * LAYERS)
    monkeypatch.setattr("model.loading.free_memory", lambda gpus: machine_with(room))
    network = DbrxForCausalLM.from_pretrained(folder, device_map="auto", offload="auto")
    assert network.load_plan is not None and network.load_plan.on_cpu == EXPERTS * LAYERS - on_card
    return network


def greedy(network: DbrxForCausalLM) -> list[int]:
    prompt = torch.arange(40, 60)[None]
    return network.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=[]).tolist()[0]


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_tokens_and_activations_alone_cross(
    split: str, folder: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token sends down its activations, ids and weights, and gets a sum, in each layer with experts on the CPU."""
    on_card = SPLITS[split]
    network = load(folder, on_card, monkeypatch)
    kinds = {type(block.get_submodule("ffn.experts")) for block in network.transformer.blocks}
    assert kinds == ({PackedExperts} if on_card == 48 else {HybridExperts})
    assert greedy(network) == tokens
    told = network.on_card()
    assert told is not None and told["experts"] == {
        k: v for k, v in {"cpu:0": on_card, "cpu": 48 - on_card}.items() if v
    }
    if network.bus is None:
        assert on_card == 48 and told["bus_bytes"] is None
        return
    assert told["bus_bytes"] == {"down": network.bus.down, "up": network.bus.up}
    assert "on the CPU" in network.kernels.name if network.kernels else False
    # 20 tokens of the prompt, of which the last layer's experts see one, and 39 of the 40 new ones, in float32.
    passed = (LAYERS - 1) * 20 + 1 + LAYERS * 39
    assert network.bus.up == passed * 4 * D_MODEL
    assert network.bus.down == passed * (4 * D_MODEL + 4 * TOP_K + 4 * TOP_K)


def test_a_card_in_words() -> None:
    told = {"kernels": "triton int4", "graph": "off", "experts": {"cuda:0": 143, "cpu": 1}}
    assert (
        card_in_words({**told, "bus_bytes": None}) == "triton int4; graph off; 143 experts on cuda:0, 1 expert on cpu"
    )
    assert card_in_words({**told, "bus_bytes": {"down": 2000, "up": 500}}).endswith(
        "; over the bus 2.0 kB down, 500 bytes up"
    )


def test_both_places_compute_at_the_same_time() -> None:
    """Each waits until the other one has begun."""
    together, seen = Barrier(2, timeout=60), []

    class Meets(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
            together.wait()
            seen.append(self.name)
            return x

    experts = HybridExperts(Meets("card"), Meets("CPU"), Bus(torch.device("cpu")))
    x = torch.randn(2, 8)
    assert torch.equal(experts(x, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)), x + x)
    assert sorted(seen) == ["CPU", "card"]


def test_a_fault_on_the_cpu_is_raised() -> None:
    def fails(*inputs: Tensor) -> Tensor:
        raise MemoryError("no room")

    answer = Bus(torch.device("cpu")).compute(fails, torch.zeros(1))
    with pytest.raises(MemoryError, match="no room"):
        answer()


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_experts_that_lie_elsewhere_add_nothing(kernel: str, rows: int) -> None:
    """Of both halves the sum is that of all, whichever tokens choose one, and for rows that choose none here."""
    torch.manual_seed(rows)
    glu = experts_of(KERNELS["int4"][0]() if kernel == "native" else PlainKernel("int4"), "silu")
    packed = [glu.pack(FloatExpert(*(torch.randn(64, 32) for _ in range(3)))) for _ in range(6)]
    x, weights = torch.randn(rows, 32), torch.rand(rows, 2)
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(rows)])
    ids[0] = torch.tensor([0, 1])
    whole = PackedExperts(glu, packed)(x, ids, weights)
    front, back = packed[:2] + [()] * 4, [()] * 2 + packed[2:]
    parts = [PackedExperts(glu, some)(x, ids, weights) for some in (front, back)]
    assert torch.equal(parts[1][0], torch.zeros(32))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def dbrx(devices: str, **options: Any) -> LoadPlan:
    return plan_load(official(), Stored(), parse_devices(devices), LoadOptions(device_map="auto", **options))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_plan_of_dbrx_beside_24_gib(scheme: str) -> None:
    """Counted by hand: what lies beside experts, keys and values of 4096 tokens; and the slower side's time."""
    plan = dbrx("24GiB@900GB/s,cpu=192GiB@80GB/s", quantize=scheme, offload="auto")
    card, cpu = plan.devices
    expert = plan.sizes.expert
    here = 640 - plan.on_cpu
    assert plan.runs and 0 < here < 640 and plan.free(card) >= ARRIVING * expert > plan.free(card) - expert
    assert plan.weights["cpu"] == plan.on_cpu * expert and sum(plan.weights.values()) == plan.sizes.total
    assert {layer.on_cpu for layer in plan.layers} <= {plan.on_cpu // 40, plan.on_cpu // 40 + 1}
    assert plan.kv == {"cuda:0": 40 * plan.sizes.kv * capacity(4096)} and plan.free(cpu) > 0
    by_cpu = 4 * plan.on_cpu / 16 * expert / 80e9
    by_card = (40 * plan.sizes.dense + plan.sizes.head) / 900e9
    assert tokens_per_s(plan) == pytest.approx(1 / (by_cpu + by_card), rel=1e-6)
    all_cpu = dbrx("cpu=192GiB@80GB/s", quantize=scheme, offload="auto")
    assert tokens_per_s(plan) > 1.15 * tokens_per_s(all_cpu)


def test_what_finds_no_room_beside_a_card() -> None:
    assert isinstance(dbrx("24GiB,cpu=32GiB", quantize="int4", offload="auto").fault, ResourceError)
    refused = dbrx("24GiB,cpu=192GiB", quantize="int4", offload="none").fault
    assert refused is not None and "leave out --offload none" in refused.one_line
    assert dbrx("4GiB,cpu=192GiB", quantize="int4", offload="cpu").fault is not None
    assert dbrx("24GiB,cpu=192GiB", quantize="int4", offload="cpu").on_cpu > 0
    small: DbrxConfig = replace(official(), n_layers=2)
    whole = plan_load(
        small, Stored(), parse_devices("24GiB"), LoadOptions(quantize="int4", device_map="auto", offload="cpu")
    )
    assert whole.runs and whole.on_cpu == 0  # all that fits lies on the card
