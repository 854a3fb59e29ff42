"""Plans against independent answers: the real network's tensors, a cache's bytes, accelerate, arithmetic by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.causal_lm import DbrxForCausalLM
from model.config import DbrxConfig, official
from model.errors import InputError, ModelError
from model.formats import open_weights
from model.formats.write_quantized import Writer
from model.kernels import choose
from model.kv_cache import KVCache
from model.load_plan import LoadOptions, LoadPlan, Stored
from model.load_planner import plan_load
from model.machine import GIB, limited, memory_bandwidth, parse_devices, parse_size
from model.placement import FORMATS, Device, Format, KernelFacts, Layer, Machine, capacity, parameters, sizes
from model.quantization import SCHEMES
from model.rates import measure
from model.speed import Rates, load_s, predict, tiers, tokens_per_s
from tests import make_plan_table
from tests.cli import Cli

BF16 = FORMATS["bfloat16"]
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# The machines that people have asked about: words, --offload, and whether all weights lie beside their processors.
MACHINES = {
    "8 x 24 GB": ("8x24GiB,cpu=128GiB", "auto", False),
    "4 x 80 GB": ("4xH100", "auto", True),
    "2 x 80 GB, 256 GB of memory": ("2xA100,cpu=256GiB", "auto", False),
    "1 x 80 GB, 512 GB of memory": ("1xA100,cpu=512GiB", "cpu", False),
    "1 x 24 GB, 64 GB of memory, disk": ("RTX4090,cpu=64GiB,disk=7GB/s", "disk", False),
}


def place(
    config: DbrxConfig,
    format: Format,
    machine: Machine,
    context: int,
    offload: str = "auto",
    expert_cache: int | None = None,
) -> LoadPlan:
    """What loading would do with a checkpoint that is stored so."""
    scheme, _, group = format.name.partition("-g")
    if scheme in FLOATS:
        stored = Stored(FLOATS[scheme])
        options = LoadOptions(device_map="auto", offload=offload, expert_cache=expert_cache, context=context)
    else:
        stored = Stored("U8", scheme, int(group or 32), plain_experts=False)
        machine = replace(machine, gpus=())
        options = LoadOptions(pack=True, offload=offload, expert_cache=expert_cache, context=context)
    return plan_load(config, stored, machine, options)


def planned(words: str, format: str = "bfloat16", context: int = 4096, offload: str = "auto") -> LoadPlan:
    return place(official(), FORMATS[format], parse_devices(words), context, offload=offload)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_are_those_of_the_network(dtype: str) -> None:
    config = DbrxConfig(
        d_model=48, n_heads=6, n_layers=3, vocab_size=1000, max_seq_len=512,
        attn_config={"kv_n_heads": 2}, ffn_config={"ffn_hidden_size": 40, "moe_num_experts": 16, "moe_top_k": 4},
    )  # fmt: skip
    network = DbrxForCausalLM(config).to(getattr(torch, dtype))
    parts = sizes(config, FORMATS[dtype])
    assert parts.total == sum(tensor.nbytes for tensor in network.state_dict().values())
    block = network.transformer.blocks[0]
    experts = sum(p.nbytes for p in block.ffn.experts.parameters())
    assert (parts.experts, parts.dense) == (experts, sum(p.nbytes for p in block.parameters()) - experts)

    cache = KVCache(config.n_layers)
    with torch.inference_mode():
        network(torch.zeros(1, 300, dtype=torch.long), past_key_values=cache)
    assert cache.nbytes == parts.kv * config.n_layers * capacity(300) and capacity(300) == 512


def test_the_real_model() -> None:
    assert parameters(official()) == 131_596_523_520
    parts = sizes(official(), BF16)
    assert parts.total == 263_193_047_040
    assert parts.expert == 396_361_728 and parts.kv * 40 == 160 * 1024
    assert parts.active == pytest.approx(71.7e9, rel=1e-3)
    few = sizes(official(), FORMATS["int3"])
    assert few.expert == parts.expert // 16 * 3.25 and few.total < 57e9  # beside attention and head in 8 bits


@pytest.mark.parametrize("name", MACHINES)
def test_a_plan_fits_and_is_whole(name: str) -> None:
    words, offload, resident = MACHINES[name]
    plan = planned(words, offload=offload)
    assert plan.runs and len(plan.layers) == 40 and plan.resident is resident
    for device in (*plan.machine.gpus, plan.machine.cpu):
        assert plan.free(device) >= 0
    # Every weight lies somewhere, once: on a device, or on the disk.
    assert sum(plan.weights.values()) + plan.on_disk * plan.sizes.experts == plan.sizes.total
    order = [layer.device for layer in plan.layers]
    assert order == sorted(order, key=lambda device: (device == "cpu", device))  # never back to an earlier device
    assert len(plan.device_map) == 40 + 3


@pytest.mark.parametrize("name", MACHINES)
def test_accelerate_finds_the_same_layers_fit(name: str) -> None:
    """Given what is left beside cache and buffers, accelerate's own map is whole on the same machines."""
    from accelerate import infer_auto_device_map

    words, _, resident = MACHINES[name]
    plan = planned(words)
    with torch.device("meta"):
        network = DbrxForCausalLM(official()).to(torch.bfloat16)
    spare = plan.sizes.buffers + 40 * plan.sizes.kv * capacity(plan.context) // max(1, len(plan.machine.gpus))
    limits: dict[int | str, int] = {i: gpu.memory - spare for i, gpu in enumerate(plan.machine.gpus)}
    limits["cpu"] = plan.machine.cpu.memory
    found = infer_auto_device_map(network, limits, no_split_module_classes=["DbrxBlock"], dtype=torch.bfloat16)
    assert plan.runs == ("disk" not in found.values())
    assert all(isinstance(where, int) for where in found.values()) == plan.resident == resident
    if not plan.runs:
        return
    blocks = {key: where for key, where in found.items() if key.startswith("transformer.blocks.")}
    assert len(blocks) == 40 and all(key.count(".") == 2 for key in blocks)  # no block is split
    on_gpus = sum(layer.device != "cpu" for layer in plan.layers)
    assert abs(sum(isinstance(where, int) for where in blocks.values()) - on_gpus) <= 1


def test_the_speed_by_hand() -> None:
    """One GPU that holds everything but experts, experts in CPU memory, a disk: each tier is bytes over bandwidth."""
    parts = sizes(official(), BF16)
    resident = planned("4xH100")
    assert tokens_per_s(resident) == pytest.approx(3350e9 / parts.active)
    assert load_s(resident) == pytest.approx(parts.total / 3e9)

    cpu = Machine((), Device("cpu", 24 * GIB, 30e9), Device("disk", 0, 2e9))
    streamed = place(official(), BF16, cpu, 1024)
    assert set(streamed.layers) == {Layer("cpu", "disk")}
    hits = streamed.cache / (40 * 16 * parts.expert)
    # The memory is read while the disk is, and never takes as long.
    by_hand = (parts.head + 40 * parts.dense) / 30e9 + (1 - hits) * 40 * 4 * parts.expert / 2e9
    assert tokens_per_s(streamed) == pytest.approx(1 / by_hand)

    # Beside a GPU its memory holds the cache, and what is missing comes over the link or from the disk.
    for offload, rate in (("cpu", 25e9), ("disk", 3e9)):
        plan = planned("1xA100,cpu=512GiB", offload=offload)
        missing = (1 - plan.cache / (40 * parts.experts)) * 40 * 4 * parts.expert
        assert 0 < plan.cache < plan.machine.gpus[0].memory and set(plan.layers) == {Layer("cuda:0", offload)}
        assert tokens_per_s(plan) == pytest.approx(1 / ((parts.head + 40 * parts.dense) / 2039e9 + missing / rate))
    # accelerate brings a layer that lies in the CPU's memory as a whole.
    split = planned("2xA100,cpu=256GiB")
    away = sum(layer.device == "cpu" for layer in split.layers)
    brought = away * (parts.dense + parts.experts) + parts.head
    here = (40 - away) * (parts.dense + 4 * parts.expert)
    # Room for that layer is kept, whatever rows there are.
    first, kept = split.devices[0], split.weights["cuda:0"] + parts.buffers + parts.dense + parts.experts
    assert split.kv_room * split.kv["cuda:0"] // sum(split.kv.values()) <= first.memory - kept
    assert 0 < away < 40 and tokens_per_s(split) == pytest.approx(1 / (here / 2039e9 + brought / 25e9))


def test_the_prediction_by_hand() -> None:
    parts = sizes(official(), BF16)
    dense, chosen = parts.head + 40 * parts.dense, 40 * 4 * parts.expert
    rates = Rates(dense=20e9, experts=15e9, layer=1e-3, arrival=1e-10)
    roomy = Machine((), Device("cpu", 300 * GIB, 30e9), Device("disk", 0, 2e9))
    resident = place(official(), BF16, roomy, 1024)
    assert resident.resident
    assert predict(resident, rates) == pytest.approx(1 / (dense / 20e9 + chosen / 15e9 + 0.04))

    streamed = place(official(), BF16, roomy, 1024, offload="disk", expert_cache=640 * parts.expert // 4)
    assert streamed.on_disk == 40 and streamed.hits == 0.25
    missing = 0.75 * chosen
    read, compute = missing / 2e9, chosen / 15e9 + missing * 1e-10
    assert predict(streamed, rates) == pytest.approx(1 / (dense / 20e9 + 0.04 + read + compute / 4))
    fast = replace(streamed, machine=replace(roomy, disk=Device("disk", 0, 100e9)))  # then computing takes longer
    assert predict(fast, rates) == pytest.approx(1 / (dense / 20e9 + 0.04 + compute + missing / 100e9 / 4))
    assert all(predict(plan, rates) < tokens_per_s(plan) for plan in (resident, streamed, fast))


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4-g128", "Q4_K"])
def test_rates_of_each_format(format: str, streamed: bool) -> None:
    config = replace(official(), ffn_config=replace(official().ffn_config, moe_num_experts=4))
    found = measure(config, format, streamed, nbytes=2**21)
    assert 1e7 < found.dense < 5e12 and 1e7 < found.experts < 5e12 and 1e-6 < found.layer < 1
    assert found.arrival >= 0 if streamed else found.arrival == 0
    assert format != "int4-g128" or not streamed or found.arrival > 1e-11  # it is packed when it arrives


@pytest.mark.parametrize("format", ["Q4_K", "mlx-4bit-g128"])
def test_rates_of_a_form_that_not_all_rows_fill(format: str) -> None:
    """The demo exported as Q4_K_M: its w2, with rows of 384, is in other types."""
    ffn = replace(official().ffn_config, moe_num_experts=4, ffn_hidden_size=160)
    found = measure(replace(official(), d_model=384, ffn_config=ffn), format, nbytes=2**20)
    assert 1e7 < found.dense < 5e12 and 1e7 < found.experts < 5e12


def test_the_largest_context_is_the_largest() -> None:
    plan = planned("4xH100")
    tight = tuple(replace(gpu, memory=gpu.memory - 13 * 10**9) for gpu in plan.machine.gpus)
    small = place(official(), BF16, replace(plan.machine, gpus=tight), 256)
    limit = small.largest_context(32768)
    assert small.resident and limit < 32768
    for context, fits in ((limit, True), (2 * limit, False)):
        assert place(official(), BF16, small.machine, context).resident is fits


@given(
    gpus=st.lists(st.integers(1, 200), max_size=9),
    cpu=st.integers(0, 600),
    context=st.sampled_from([1, 4096, 32768]),
    format=st.sampled_from(sorted(FORMATS)),
    offload=st.sampled_from(["auto", "none", "cpu", "disk"]),
)
def test_no_machine_is_overfilled(gpus: list[int], cpu: int, context: int, format: str, offload: str) -> None:
    machine = Machine(
        tuple(Device(f"cuda:{i}", size * GIB, 1e12, 25e9) for i, size in enumerate(gpus)),
        Device("cpu", cpu * GIB, 50e9),
        Device("disk", 0, 3e9),
    )
    plan = place(official(), FORMATS[format], machine, context, offload=offload)
    if not plan.runs:
        assert tokens_per_s(plan) == 0 and not plan.device_map and not tiers(plan)
        return
    assert len(plan.layers) == 40 and tokens_per_s(plan) > 0
    for device in (*machine.gpus, machine.cpu):
        assert plan.free(device) >= 0, device
    assert plan.largest_context(32768) >= context


def test_words_for_machines() -> None:
    machine = parse_devices("2xH100, 24GiB@500GB/s, cpu=256GiB@100GB/s, disk=7GB/s")
    assert [gpu.name for gpu in machine.gpus] == ["cuda:0", "cuda:1", "cuda:2"]
    assert machine.gpus[0].bandwidth == 3350e9 and machine.gpus[2].bandwidth == 500e9
    assert machine.cpu.bandwidth == 100e9 and machine.disk.bandwidth == 7e9
    assert limited(machine, {1: "70GiB", "cpu": "8GB"}).gpus[1].memory == 70 * GIB
    assert [parse_size(text, "--split") for text in ("1.5k", "2KiB", "3 GB", "7")] == [1500, 2048, 3 * 10**9, 7]


NO_MACHINES = ["", "x", "4x", "0xH100", "gpu=3", "cpu=", "cpu=x", "disk=0", "24GiB@", "24GiB@0", ","]


@pytest.mark.parametrize("words", NO_MACHINES)
def test_words_that_make_no_machine(words: str) -> None:
    with pytest.raises(InputError):
        parse_devices(words)


def test_this_machine_reads_its_memory() -> None:
    assert 1e9 < memory_bandwidth() < 5e12


def test_the_command(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "RTX4090,cpu=64GiB,disk=7GB/s"
    result = cli("plan", "databricks/dbrx-instruct", "--devices", words, "--offload", "disk", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["weights_bytes"] == 263_193_047_040 and plan["runs"]
    assert plan["tokens_per_s_ceiling"] == pytest.approx(tokens_per_s(planned(words, offload="disk")))
    assert any("from the disk" in line for line in plan["advice"])
    assert plan["tokens_per_s_predicted"] is None  # nothing there could be measured

    shown = " ".join(cli("plan", "databricks/dbrx-instruct", "--devices", "1xH100,cpu=128GiB").out.split())
    assert "--quantize int8 would fit one GPU and the CPU's memory: predicted, at most" in shown
    four = " ".join(cli("plan", "databricks/dbrx-instruct", "--devices", "4xH100").out.split())
    assert "predicted, with nothing measured: at most 47 tokens/s" in four and "layers 0-9" in four
    monkeypatch.setenv("COLUMNS", "100")
    bars = cli("plan", "databricks/dbrx-instruct", "--devices", words, "--offload", "disk").out
    assert f"disk   {40 * '░'} " in bars  # beside long words, too
    small = cli("plan", "databricks/dbrx-instruct", "--devices", "cpu=8GiB")
    assert small.code == 0 and "does not run" in small.out
    assert cli("plan", "databricks/dbrx-instruct", "--devices", "5xC64").code == 2
    assert cli("plan", tmp_path).code == 3


def in_int4(machine: Machine, device_map: str = "auto") -> LoadPlan:
    return plan_load(official(), Stored(), machine, LoadOptions(quantize="int4", device_map=device_map))


def test_weights_in_few_bits_lie_on_as_few_gpus_as_hold_them() -> None:
    """With activations in bfloat16, or nowhere: what to type instead is said."""
    plan = in_int4(parse_devices("2xRTX4090,H200,cpu=256GiB"))
    assert plan.runs and set(plan.layers) == {Layer("cuda:2", "cuda:2")} and plan.converts and not plan.mapped
    assert (
        plan.kernel == KernelFacts("triton", "bfloat16", "packed") and (plan.dtype, plan.kv_dtype) == ("bfloat16",) * 2
    )
    assert plan.weights == {"cuda:2": plan.sizes.total} and plan.free(plan.machine.gpus[0]) > 50e9
    several = in_int4(parse_devices("6xRTX4090,cpu=256GiB"))
    counts = Counter(layer.device for layer in several.layers)
    assert several.resident and list(counts.values()) == [10, 10, 10, 10]  # 2.1 GB each, of 22.6 GB
    assert sum(several.weights.values()) == several.sizes.total and all(
        several.free(gpu) > 0 for gpu in several.devices
    )
    assert tokens_per_s(several) == pytest.approx(1008e9 / several.sizes.active)
    for device_map, layers in (("auto", [20, 20]), ("sequential", [37, 3]), ("balanced", [13, 14, 13])):
        spread = in_int4(parse_devices("3xH100"), device_map)
        assert spread.resident and [*Counter(layer.device for layer in spread.layers).values()] == layers
    small = in_int4(parse_devices("2xRTX4090,cpu=256GiB"))
    assert small.fault is not None and "(--offload auto)" in str(small.fault.hint)
    old = replace(parse_devices("V100,cpu=256GiB"), card=lambda form, group, device: None)
    with pytest.raises(ModelError, match="cuda:0 has no kernels for int4 weights") as refused:
        in_int4(old)
    assert "compute capability 8.0" in refused.value.message and "--device-map cpu" in str(refused.value.hint)


def test_floats_are_packed_for_gpus_that_hold_all_of_them() -> None:
    """As bfloat16; other types, and floats of which some lie elsewhere, are PyTorch's."""

    def planned(words: str, **changes: Any) -> LoadPlan:
        options = LoadOptions(**{"pack": True, "device_map": "auto", "offload": "auto"} | changes)
        return plan_load(official(), Stored(), parse_devices(words), options)

    whole = planned("4xH100,cpu=256GiB")
    assert whole.runs and whole.resident and whole.kernel == KernelFacts("triton", "bfloat16", "packed")
    assert (whole.scheme, whole.format, whole.kv_dtype) == ("none", "bfloat16", "bfloat16")
    assert planned("4xH100,cpu=256GiB", pack=False).weights.keys() == whole.weights.keys()
    for words, changes in (
        ("2xH100,cpu=256GiB", {}),
        ("4xH100,cpu=300GiB", {"dtype": "float16"}),
        ("4xH100,cpu=300GiB", {"offload": "cpu"}),
    ):
        other = planned(words, **changes)
        assert other.runs and other.kernel is None and other == planned(words, pack=False, **changes)


@pytest.mark.parametrize(("words", "scheme"), [("24GiB", "none"), ("24GiB", "int4"), ("cpu=4GiB", "int4")])
def test_ranks_that_find_no_room_are_told_of_no_flag_that_they_have_not(words: str, scheme: str) -> None:
    """One device is the place of a rank, and nothing is streamed there: --offload and --device-map would be refused."""
    stored = Stored() if scheme == "none" else Stored("U8", scheme, 32, plain_experts=False)
    machine = parse_devices(words)
    options = LoadOptions(device_map="cuda:0" if machine.gpus else "cpu", ranks=2)
    fault = plan_load(official(), stored, machine, options).fault
    assert fault is not None and "of a rank take" in fault.message
    assert re.findall(r"--[a-z-]+", fault.one_line) == ["--nproc-per-node"]
    with pytest.raises(ModelError, match="int3 weights compute on the CPU") as refused:
        plan_load(
            official(), replace(stored, scheme="int3"), parse_devices("24GiB"), replace(options, device_map="auto")
        )
    assert str(refused.value.hint).startswith("run it without torchrun, and give --device-map cpu")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            ("--devices", "H200", "--quantize", "int4", "--offload", "disk"),
            "int4 weights compute on GPUs and on the CPU",
        ),
        (("--devices", "H200", "--quantize", "int3"), "int3 weights compute on the CPU; "),
        (("--devices", "cpu=512GiB", "--attn", "flash"), "flash attention needs an NVIDIA GPU"),
        (("--devices", "4xH100", "--device-map", "cpu", "--attn", "flash"), "flash attention needs an NVIDIA GPU"),
        (("--devices", "8xH100", "--dtype", "float32", "--attn", "flash"), "bfloat16 or float16"),
    ],
)
def test_nothing_is_planned_that_is_refused_when_it_runs(cli: Cli, options: tuple[str, ...], named: str) -> None:
    result = cli("plan", "databricks/dbrx-instruct", *options)
    assert result.code == 3 and named in result.err and not result.out


def test_a_context_that_the_model_has_not_is_refused_before_anything_is_read(
    cli: Cli, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("dbrx_cli.engine.local.load_network")
    for command in (("plan", "--devices", "cpu=8GiB"), ("generate", "hi")):
        result = cli(*command, "-m", tiny_checkpoint, "--context", "641")
        assert result.code == 2 and "--context 641 is more than the 640 tokens" in result.fault


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-memory", "cpu=-1"),
        ("--max-memory", "cpu=1e9"),
        ("--max-memory", "cpu=" + 400 * "9"),
        ("--expert-cache", "nan"),
        ("--expert-cache", 400 * "9"),
        ("--devices", "cpu=much"),
        ("--devices", "cpu=8GiB,disk=fast"),
        ("--devices", f"24GiB@{400 * '9'}GB/s"),
    ],
)
def test_a_size_that_is_none_is_told_with_its_flag(cli: Cli, flag: str, value: str) -> None:
    machine = () if flag == "--devices" else ("--devices", "cpu=8GiB")
    result = cli("plan", "databricks/dbrx-instruct", *machine, flag, value)
    assert result.code == 2 and result.fault.startswith(f"dbrx: {flag}: ")


def test_a_map_that_is_given_is_not_planned(cli: Cli) -> None:
    for where in ("cuda:1", "map.json"):
        result = cli("plan", "databricks/dbrx-instruct", "--devices", "4xH100", "--device-map", where)
        assert result.code == 2 and where in result.err
    on_cpu = json.loads(
        cli("plan", "databricks/dbrx-instruct", "--devices", "4xH100", "--device-map", "cpu", "--json").out
    )
    assert [device["name"] for device in on_cpu["devices"]] == ["cpu"]


def test_the_table_of_the_readme_is_the_plans_own() -> None:
    assert make_plan_table.README.read_text("utf-8") == make_plan_table.page(), "run `make docs`"


@pytest.mark.parametrize("machine", make_plan_table.MACHINES)
def test_a_kernel_serves_each_cell_of_the_table(machine: str) -> None:
    for form in make_plan_table.FORMS:
        _, plan = make_plan_table.fastest(make_plan_table.MACHINES[machine], form)
        if plan.kernel is None:
            assert plan.scheme == "none"  # tensors are PyTorch's
        elif plan.machine.gpus:
            assert plan.kernel == KernelFacts("triton", "bfloat16", "packed")
            assert plan.format == "bfloat16" or SCHEMES[form].on_cards
            assert all(find_spec(f"model.kernels.cuda_{name}") for name in ("linear", "glu", "block"))
        if plan.kernel and (plan.on_cpu or not plan.machine.gpus):
            assert choose(plan.scheme if plan.scheme != "none" else plan.format)


def test_a_local_checkpoint(cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.rates.measure", partial(measure, nbytes=2**21))
    plan = json.loads(cli("plan", checkpoint, "--json").out)
    assert plan["runs"] and set(plan["experts"]) == {"cpu"}
    assert 0 < plan["tokens_per_s_predicted"] < plan["tokens_per_s_ceiling"]
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert plan["weights_bytes"] == pytest.approx(stored, rel=0.02)


def test_a_stored_format_and_streaming_are_planned_as_they_run(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = Rates(dense=1e9, experts=1e9, layer=1e-4)
    asked: list[tuple[str, bool]] = []

    def measured(config: DbrxConfig, format: str, streamed: bool) -> Rates:
        asked.append((format, streamed))
        return rates

    monkeypatch.setattr("model.rates.measure", measured)
    with open_weights(tiny_checkpoint) as weights:
        Writer(weights, tmp_path / "int4", "int4", 128).write(lambda _: None)
    options = ("--offload", "disk", "--expert-cache", "200kB", "--json")
    plans = {
        name: json.loads(cli("plan", *args, *options).out)
        for name, args in {
            "as stored": (tiny_checkpoint,),
            "on the way": (tiny_checkpoint, "--quantize", "int4"),
            "int4": (tmp_path / "int4",),
        }.items()
    }
    assert asked == [("bfloat16", True), ("int4", True), ("int4-g128", True)]
    assert all(set(plan["experts"]) == {"disk"} for plan in plans.values())
    assert all(100_000 < plan["devices"][-1]["expert_cache"] <= 200_000 for plan in plans.values())
    assert plans["as stored"]["tokens_per_s_predicted"] and plans["int4"]["tokens_per_s_predicted"]
    assert plans["on the way"]["tokens_per_s_predicted"] is None
