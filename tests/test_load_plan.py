"""What is planned is what is loaded: random configurations, memories and options, each planned and then loaded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import DbrxForCausalLM, KVCache
from model.config import official
from model.errors import DbrxError
from model.experts import PackedExperts, ResidentExperts
from model.experts.streamed import StreamedExperts
from model.formats import open_weights
from model.formats.write_quantized import Writer
from model.kernels import PackedLinear, kernel_facts
from model.load_plan import LoadOptions, LoadPlan, Stored
from model.load_planner import plan_load
from model.placement import Device, Machine, capacity
from model.quantization import SCHEMES
from tests.weights import make_checkpoint

LOADED, DESCRIBED = 200, 200
QUICK = 30  # of those that are loaded, without the slow tests
FORMS = ("float32", "bfloat16", "float16", *SCHEMES)
Case = tuple[str, int, dict[str, Any]]  # a stored form, bytes of free memory, options


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny networks of different shapes, in each form that files have."""
    folder = tmp_path_factory.mktemp("planned")
    found: dict[str, Path] = {}
    for name, experts, layers in (("few", 4, 3), ("many", 16, 2)):
        config = {
            "d_model": 48, "n_heads": 6, "n_layers": layers, "max_seq_len": 8192, "vocab_size": 500,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 500000}, "ffn_config": {
                "ffn_hidden_size": 320, "moe_num_experts": experts, "moe_top_k": 2
            },
        }  # fmt: skip
        for dtype in FORMS[:3]:
            found[f"{name} {dtype}"] = make_checkpoint(folder / f"{name}-{dtype}", config, 3, dtype, shards=1)
        for scheme in FORMS[3:]:
            found[f"{name} {scheme}"] = folder / f"{name}-{scheme}"
            with open_weights(found[f"{name} bfloat16"]) as weights:
                Writer(weights, found[f"{name} {scheme}"], scheme, 64 if scheme == "int4" else None).write(
                    lambda _: None
                )
    return found


def cases(names: list[str], total: dict[str, int]) -> Iterator[Case]:
    """Free memory around the bytes of the weights, so that each of the limits decides some of them."""
    draw = random.Random(25)
    for _ in range(LOADED):
        name = draw.choice(names)
        options: dict[str, Any] = {
            "dtype": draw.choice(["auto", "auto", *FORMS[:3]]),
            "quantize": draw.choice(["auto", "none", "none", *FORMS[3:]]),
            "pack": draw.random() < 0.7,
            "offload": draw.choice(["auto", "auto", "auto", "none", "cpu", "disk"]),
            "expert_cache": draw.choice([None, None, None, 10_000, 500_000, 10**9]),
            "context": draw.choice([None, 1, 300, 8192, 10**6]),
            "max_memory": draw.choice([None, None, None, {"cpu": f"{total[name] * 6 // 5}"}]),
        }
        yield (
            name,
            int(total[name] * draw.choice([0.5, 1, 1.3, 1.6, 2, 3]) + draw.choice([0, 10**6, 6 * 10**6])),
            options,
        )


@pytest.mark.parametrize(
    "part", [slice(QUICK), pytest.param(slice(QUICK, None), marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_what_is_planned_is_what_is_loaded(
    stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch, part: slice
) -> None:
    total = {name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for name, path in stored.items()}
    seen: set[str] = set()
    for name, free, options in list(cases(list(stored), total))[part]:
        machine = Machine((), Device("cpu", free, 0), Device("disk", 0, 0), kernel_facts)
        monkeypatch.setattr("model.loading.free_memory", lambda gpus, machine=machine: machine)
        with open_weights(stored[name]) as weights:
            plan = plan_load(weights.config, Stored.of(weights), machine, LoadOptions(**options))
        if plan.fault is not None:
            with pytest.raises(type(plan.fault)) as refused:
                DbrxForCausalLM.from_pretrained(stored[name], **options)
            assert refused.value.one_line == plan.fault.one_line
            seen.add("refused")
            continue
        network = DbrxForCausalLM.from_pretrained(stored[name], **options)
        try:
            check(network, plan)
        finally:
            if network.expert_store is not None:
                network.expert_store.close()
        seen |= {plan.scheme, plan.offload, "packed" if plan.kernel else "as tensors"}
        assert plan.free(machine.cpu) >= 0
    assert seen >= {"refused", "none", "disk", *FORMS[3:], "packed", "as tensors"}  # all kinds were among them


def check(network: DbrxForCausalLM, plan: LoadPlan) -> None:
    """Every tensor, kernel and expert of a network, looked at, against the plan."""
    assert network.load_plan == plan
    assert str(network.dtype) == f"torch.{plan.dtype}" and str(network.kv_dtype) == f"torch.{plan.kv_dtype}"
    assert all(tensor.device.type == "cpu" for tensor in network.state_dict().values())
    assert set(plan.device_map.values()) == {"cpu"} and network.prefill_chunk == plan.chunk
    kernels = network.kernels
    assert (kernels is None) == (plan.kernel is None)
    if kernels is not None and plan.kernel is not None:
        assert (kernels.name, kernels.quantize, kernels.converts) == (plan.kernel.name, plan.scheme, plan.converts)
    for block, layer in zip(network.transformer.blocks, plan.layers, strict=True):
        attention, experts = block.get_submodule("norm_attn_norm.attn"), block.get_submodule("ffn.experts")
        assert isinstance(attention.Wqkv, PackedLinear) == (plan.kernel is not None)
        kind = StreamedExperts if layer.experts == "disk" else PackedExperts if plan.kernel else ResidentExperts
        assert type(experts) is kind
        if plan.kernel and kind is PackedExperts:
            assert experts.kernel.quantization == plan.scheme
    store = network.expert_store
    assert (store is None) == (plan.offload == "none")
    assert store is None or (store.capacity == plan.kept and plan.kept >= 2)
    # Bytes: of what is held as tensors exactly, and of the cache that grows beside it.
    cache = KVCache(len(plan.layers))
    with torch.inference_mode():
        network(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache)
    assert cache.nbytes == plan.sizes.kv * len(plan.layers) * capacity(3)
    if plan.kernel is None and plan.offload == "none":
        assert sum(tensor.nbytes for tensor in network.state_dict().values()) == plan.sizes.total


@pytest.mark.parametrize("seed", range(DESCRIBED))
def test_no_described_machine_is_overfilled(seed: int) -> None:
    """GPUs too: nothing overfills, every weight lies somewhere once, and loading would be told the same places."""
    draw = random.Random(seed)
    config = replace(official(), n_layers=draw.randint(1, 40))
    gpus = tuple(Device(f"cuda:{i}", draw.randint(1, 200) * 10**9, 1e12, 25e9) for i in range(draw.randint(0, 8)))
    machine = Machine(gpus, Device("cpu", draw.randint(1, 600) * 10**9, 5e10), Device("disk", 0, 3e9))
    offload = draw.choice(["auto", "none", "cpu", "disk"])
    options = LoadOptions(
        quantize=draw.choice(["none", "int8", "int4"]) if offload != "disk" else "none",
        pack=True,
        device_map=draw.choice(["auto", "balanced", "sequential", "cpu", *(gpu.name for gpu in gpus)]),
        offload=offload,
        context=draw.choice([None, 1, 32768]),
    )
    form = Stored(draw.choice(["BF16", "F32"]))
    plan = plan_load(config, form, machine, options)
    if plan.fault is not None:
        assert isinstance(plan.fault, DbrxError) and plan.fault.hint and not plan.device_map
        return
    used = (*plan.machine.gpus, plan.machine.cpu)
    assert all(plan.free(device) >= 0 for device in used)
    placed = sum(plan.weights.values()) + plan.on_disk * plan.sizes.experts
    assert placed == plan.sizes.total or plan.mapped
    names = {"transformer.wte", "transformer.norm_f", "lm_head"} | {
        f"transformer.blocks.{i}" for i in range(config.n_layers)
    }
    assert plan.device_map.keys() == names and set(plan.device_map.values()) <= {device.name for device in used}
    assert [plan.device_map[f"transformer.blocks.{i}"] for i in range(config.n_layers)] == [
        layer.device for layer in plan.layers
    ]
