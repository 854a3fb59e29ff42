"""Experts in two places, with the CPU in the card's: the same tokens, and only activations cross between them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import product
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
from model.expert_use import Counts
from model.experts import Bus, Crossing, HybridExperts, PackedExperts
from model.formats import open_weights
from model.formats.write_quantized import Writer
from model.kernels import experts_of, kernel_facts
from model.kernels.registry import KERNELS
from model.kernels.torch_plain import PlainKernel
from model.kv_cache import KVCache
from model.load_layout import STREAMED_CHUNK
from model.load_plan import ARRIVING, CONTEXT, LoadOptions, LoadPlan, Stored
from model.load_planner import plan_load
from model.machine import parse_devices
from model.placement import PREFILL_CHUNK, Device, KernelFacts, Machine, capacity
from model.sampling import SamplingParams
from model.scheduler import Scheduler
from model.sequence import Sequence
from model.speed import Side, Sides, tokens_per_s
from model.weights import FloatExpert
from tests.weights import make_checkpoint

LAYERS, D_MODEL, EXPERTS, TOP_K = 3, 64, 16, 4
CONFIG: dict[str, Any] = {
    "d_model": D_MODEL, "n_heads": 4, "n_layers": LAYERS, "vocab_size": 200, "max_seq_len": 512,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 500000, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
}  # fmt: skip
MANY = 300
# Of a CPU and a card, bytes and operations a second; and of the bus between them.
RATES = [*product((20e9, 80e9, 400e9), (5e10, 1e12, 5e12), (4e11, 3e12), (3e13, 4e14), (3e9, 12e9, 50e9))]
SPLITS = {"all on the card": 48, "uneven": 20, "one layer has none": 2, "none on the card": 0}
MOVES = Sides(Side(0, 0), Side(1, 1), 1e-3, 1.0)  # experts of a long step stay, and of short ones the card is quicker
STAY, COME = (Sides(Side(1, 1), Side(0, 0), bus) for bus in (1e9, 0.0))  # experts of the CPU, in a long step


def as_card(form: str, group: int | None, device: str) -> KernelFacts | None:
    """The CPU's kernels, in the place of a card's."""
    return kernel_facts(form, group, form)


def machine_with(*memory: int) -> Machine:
    cards = tuple(Device(f"cpu:{i}", each, 1e12, 25e9) for i, each in enumerate(memory))  # for PyTorch all are the CPU
    return Machine(cards, Device("cpu", 2**30, 5e10), Device("disk", 0, 3e9), kernel_facts, as_card)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of longer ones are larger than these networks."""
    monkeypatch.setattr("model.load_layout.STREAMED_CHUNK", PREFILL_CHUNK)


@pytest.fixture(scope="module", params=["int8", "int4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid")
    with open_weights(make_checkpoint(path / "floats", CONFIG, 11)) as floats:
        Writer(floats, path / request.param, request.param, 32).write(lambda _: None)
    return path / str(request.param)


@pytest.fixture(scope="module")
def alone(folder: Path) -> DbrxForCausalLM:
    """The network in one place."""
    network = DbrxForCausalLM.from_pretrained(folder, pack=True)
    assert network.on_card() is None
    return network


@pytest.fixture(scope="module")
def tokens(alone: DbrxForCausalLM) -> list[int]:
    return greedy(alone)


@pytest.fixture(scope="module")
def after_many(alone: DbrxForCausalLM) -> list[int]:
    """Behind a prompt so long that all of its experts have tokens enough for the CPU's products of many rows."""
    return greedy(alone, 8, MANY)


def planned(folder: Path, machine: Machine) -> LoadPlan:
    with open_weights(folder) as weights:
        return plan_load(weights.config, Stored.of(weights), machine, LoadOptions(device_map="auto", offload="auto"))


def load(folder: Path, on_card: int, monkeypatch: pytest.MonkeyPatch, use: Counts = ()) -> DbrxForCausalLM:
    """With room for so many experts on the card, to the byte."""
    plenty, away = planned(folder, machine_with(2**40)), EXPERTS * LAYERS - on_card
    room = 2**40 - plenty.free(plenty.machine.gpus[0]) - plenty.sizes.expert * away
    room += plenty.sizes.expert * ARRIVING * (away > 0)
    network = load_on(folder, machine_with(room), monkeypatch, use)
    assert network.load_plan is not None and network.load_plan.on_cpu == away
    return network


def load_on(folder: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, use: Counts = ()) -> DbrxForCausalLM:
    monkeypatch.setattr("model.loading.free_memory", lambda gpus: machine)
    return DbrxForCausalLM.from_pretrained(folder, device_map="auto", offload="auto", use=use)


def greedy(network: DbrxForCausalLM, count: int = 40, length: int = 20) -> list[int]:
    prompt = torch.arange(40, 40 + length)[None] % 200
    return network.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=[]).tolist()[0]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.usefixtures("short_chunks")
def test_the_same_tokens_and_activations_alone_cross(
    split: str, folder: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token sends down its activations, ids and weights, and gets a sum, in each layer with experts on the CPU."""
    on_card = SPLITS[split]
    network = load(folder, on_card, monkeypatch)
    kinds = {type(block.get_submodule("ffn.experts")) for block in network.transformer.blocks}
    assert kinds == ({PackedExperts} if on_card == 48 else {HybridExperts})
    if network.bus is not None:
        network.bus.sides = STAY
    assert greedy(network) == tokens
    told = network.on_card()
    assert told is not None and told["experts"] == {
        k: v for k, v in {"cpu:0": on_card, "cpu": 48 - on_card}.items() if v
    }
    if network.bus is None:
        assert on_card == 48 and told["bus_bytes"] is None
        return
    assert told["bus_bytes"] == {"down": network.bus.down, "up": network.bus.up, "weights": 0}
    assert "on the CPU" in network.kernels.name if network.kernels else False
    # 20 tokens of the prompt, of which the last layer's experts see one, and 39 of the 40 new ones, in float32.
    passed = (LAYERS - 1) * 20 + 1 + LAYERS * 39
    assert network.bus.up == passed * 4 * D_MODEL
    assert network.bus.down == passed * (4 * D_MODEL + 4 * TOP_K + 4 * TOP_K)


@pytest.mark.usefixtures("short_chunks")
def test_experts_of_a_prompt_come_to_the_card(
    folder: Path, after_many: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the CPU that a token chose, once each, and nothing else crosses; with what is measured, too."""
    network, new = load(folder, 20, monkeypatch), 8
    bus, plan = network.bus, network.load_plan
    assert bus is not None and plan is not None
    bus.sides = COME
    assert greedy(network, new, MANY) == after_many
    # The last layer's experts see one token of the prompt: a short step.
    assert bus.up == (1 + LAYERS * (new - 1)) * 4 * D_MODEL
    brought = bus.weights
    with torch.inference_mode():
        routers = network(torch.tensor([after_many[:MANY]]), output_router_logits=True).router_logits[:-1]
    chosen = [set(each.topk(TOP_K).indices.flatten().tolist()) for each in routers]
    came = sum(i in layer.away for each, layer in zip(chosen, plan.layers, strict=False) for i in each)
    assert brought == came * network.expert_bytes > 0
    bus.sides = None
    assert greedy(network, new, MANY) == after_many
    assert bus.sides is not None and min(bus.sides.bus, bus.sides.cpu.seconds(1), bus.sides.card.seconds(1)) > 0


def lie_on_card(network: DbrxForCausalLM) -> list[list[int]]:
    """The experts of each layer that the card's kernel computes."""
    runs = [block.get_submodule("ffn.experts.on_card").held.runs for block in network.transformer.blocks]
    return [[expert for run in of for expert in range(*run)] for of in runs]


@pytest.mark.usefixtures("short_chunks")
def test_experts_change_places_between_replies(
    folder: Path, alone: DbrxForCausalLM, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted as a network in one place routes; then those of most use lie on the card, and the tokens are the same."""
    network = load(folder, 20, monkeypatch)
    bus, before = network.bus, lie_on_card(network)
    assert bus is not None and before == [[*range(count)] for count in (6, 7, 7)]
    bus.sides = MOVES
    assert greedy(network) == tokens and lie_on_card(network) == before
    cache, by_hand = KVCache(LAYERS), torch.zeros(LAYERS, EXPERTS, dtype=torch.long)
    with torch.inference_mode():
        for ids in (tokens[:20], *([token] for token in tokens[20:-1])):
            routers = alone(torch.tensor([ids]), past_key_values=cache, output_router_logits=True).router_logits
            for layer, router in enumerate(routers):
                if len(ids) == 1 or layer == LAYERS - 1:  # which sees the last token of a prompt alone
                    by_hand[layer, router[-1].topk(TOP_K).indices] += 1
    assert bus.used == by_hand.tolist()

    def hear(counts: list[int]) -> None:
        for used in bus.used:
            used[:] = counts

    hear([100 * expert for expert in range(EXPERTS)])  # those of most use are on the CPU
    with monkeypatch.context() as full:
        full.setattr(Crossing, "_bring", lambda *_: torch.empty(2**60))
        network.place_by_use()
        assert lie_on_card(network) == before
    assert greedy(network) == tokens
    after = [[*range(EXPERTS - len(each), EXPERTS)] for each in before]
    assert lie_on_card(network) == after and bus.weights == 2 * 20 * network.expert_bytes
    told = network.on_card()
    assert told is not None and told["experts"] == {"cpu:0": 20, "cpu": 28}
    scheduler = Scheduler(network, 2)
    for _ in range(2):
        scheduler.add(Sequence([1, 2, 3], SamplingParams(max_tokens=3)))
        scheduler.step()
        hear([100 * (EXPERTS - expert) for expert in range(EXPERTS)])
    assert lie_on_card(network) == after  # a reply was under way
    while len(scheduler):
        scheduler.step()
    scheduler.add(Sequence([1, 2, 3], SamplingParams(max_tokens=3)))
    assert lie_on_card(network) == before


@pytest.mark.usefixtures("short_chunks")
def test_a_load_begins_with_the_experts_of_most_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use = [random.Random(layer).sample(range(1000), EXPERTS) for layer in range(LAYERS)]
    network = load(folder, 20, monkeypatch, use)
    best = [sorted(range(EXPERTS), key=counts.__getitem__) for counts in use]
    assert lie_on_card(network) == [sorted(each[-count:]) for each, count in zip(best, (6, 7, 7), strict=True)]
    assert network.bus is not None and network.bus.used == use


def test_a_prompt_is_never_slower_than_in_one_place() -> None:
    """Over a grid of rates and lengths, five of sixteen experts on the card: at most 5 % beyond the better place."""
    size, flops, gains = 198e6 * 0.625, 2 * 198e6, []  # of an expert: bytes in int4, operations of a token
    draw, counts = random.Random(4), {}
    for length in (9, 64, 512, 2048):
        chosen = Counter(expert for _ in range(length) for expert in draw.sample(range(EXPERTS), TOP_K))
        counts[length] = [chosen[expert] for expert in range(EXPERTS)]
    for (cpu_reads, cpu_computes, card_reads, card_computes, bus), tokens in product(RATES, counts.values()):
        on_cpu = [(size / cpu_reads + n * flops / cpu_computes) * (n > 0) for n in tokens]
        on_card = [(size / card_reads + n * flops / card_computes) * (n > 0) for n in tokens]
        brought = [seconds + size / bus * (n > 0) for seconds, n in zip(on_card, tokens, strict=True)]
        sides = Sides(
            Side(size / cpu_reads, flops / cpu_computes), Side(size / card_reads, flops / card_computes), size / bus
        )
        coming, seconds = sides.split({i: n for i, n in enumerate(tokens) if n and i >= 5}, tokens[:5])
        left = [i for i in range(5, EXPERTS) if i not in coming]
        by_hand = sum(on_card[:5]) + sum(brought[i] for i in coming), sum(on_cpu[i] for i in left)
        assert seconds == pytest.approx(max(by_hand))
        gains.append(min(sum(on_cpu), sum(brought)) / seconds)
    assert min(gains) > 1 / 1.05 and max(gains) > 1.8


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.usefixtures("short_chunks")
def test_layers_on_two_cards(fits: bool, folder: Path, after_many: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, each with kernels of its card; what finds no room on either is with the CPU."""
    parts = planned(folder, machine_with(2**40)).sizes
    block = parts.dense + parts.kv * capacity(512)
    memory = parts.buffers + parts.embedding + parts.head + 2 * (block + parts.experts)
    memory -= 24 * parts.expert * (not fits)
    network = load_on(folder, machine_with(memory, memory), monkeypatch)
    plan = network.load_plan
    assert plan is not None and [layer.device for layer in plan.layers] == ["cpu:0", "cpu:1", "cpu:1"]
    assert (plan.on_cpu == 0) == fits and all(plan.free(device) >= 0 for device in plan.devices)
    assert sum(plan.weights.values()) == parts.total
    if network.bus is not None:
        network.bus.sides = COME
    assert greedy(network, 8, MANY) == after_many


def test_a_card_in_words() -> None:
    told = {"kernels": "triton int4", "graph": "off", "experts": {"cuda:0": 143, "cpu": 1}}
    assert (
        card_in_words({**told, "bus_bytes": None}) == "triton int4; graph off; 143 experts on cuda:0, 1 expert on cpu"
    )
    assert card_in_words({**told, "bus_bytes": {"down": 2000, "up": 500, "weights": 0}}).endswith(
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

    experts = HybridExperts(Meets("card"), Meets("CPU"), Bus())
    x = torch.randn(2, 8)
    assert torch.equal(experts(x, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)), x + x)
    assert sorted(seen) == ["CPU", "card"]


def test_a_fault_on_the_cpu_is_raised() -> None:
    def fails(*inputs: Tensor) -> Tensor:
        raise MemoryError("no room")

    answer = Bus().compute(fails, torch.zeros(1))
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


def test_a_prompt_is_read_in_short_steps_where_all_has_room_but_for_longer_ones() -> None:
    """As many bytes as are needed with short steps, and one less."""
    parts = dbrx("B200", quantize="int4").sizes
    short = parts.buffers * PREFILL_CHUNK // STREAMED_CHUNK
    needed = parts.total + short + 40 * parts.kv * capacity(CONTEXT)
    for memory, chunk in ((needed, PREFILL_CHUNK), (needed - 1, STREAMED_CHUNK)):
        machine = Machine((Device("cuda:0", memory, 4e12, 25e9),), Device("cpu", 2**37, 80e9), Device("disk", 0, 7e9))
        plan = plan_load(official(), Stored(), machine, LoadOptions(quantize="int4", device_map="auto", offload="auto"))
        assert plan.runs and plan.chunk == chunk and (plan.on_cpu > 0) == (chunk == STREAMED_CHUNK)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_plan_of_dbrx_beside_24_gib(scheme: str) -> None:
    """Counted by hand: what lies beside experts, keys and values of 4096 tokens; and the slower side's time."""
    plan = dbrx("24GiB@900GB/s,cpu=192GiB@80GB/s", quantize=scheme, offload="auto")
    card, cpu = plan.devices
    whole = dbrx("B200", quantize=scheme)
    expert = plan.sizes.expert
    here = 640 - plan.on_cpu
    assert plan.chunk == whole.chunk == STREAMED_CHUNK and plan.sizes.buffers == whole.sizes.buffers
    assert plan.runs and 0 < here < 640 and 0 <= plan.free(card) < expert == plan.arriving_on(card) / ARRIVING
    # Rows get no more: what a prompt brings over the bus keeps its place.
    assert plan.kv_room - sum(plan.kv.values()) == plan.free(card)
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
    assert refused is not None and "(--offload auto)" in refused.one_line
    assert dbrx("4GiB,cpu=192GiB", quantize="int4", offload="cpu").fault is not None
    assert dbrx("24GiB,cpu=192GiB", quantize="int4", offload="cpu").on_cpu > 0
    small: DbrxConfig = replace(official(), n_layers=2)
    whole = plan_load(
        small, Stored(), parse_devices("24GiB"), LoadOptions(quantize="int4", device_map="auto", offload="cpu")
    )
    assert whole.runs and whole.on_cpu == 0  # all that fits lies on the card
