"""Where whole layers go: accelerate's map on machines that are described, and what dispatching then does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook

from model.causal_lm import DbrxForCausalLM
from model.config import official
from model.devices import dispatch
from model.errors import DbrxError, InputError, ResourceError
from model.load_plan import LoadOptions, Stored
from model.load_planner import plan_load
from model.placement import Device, Machine
from tests.cli import Cli


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled here: accelerate's hooks would import PyTorch's compiler to leave themselves out of it."""
    monkeypatch.setattr(torch.compiler, "disable", lambda function: function)


GB = 10**9
# GPUs and CPU memory in GB, and which kinds of place the whole layers of 263 GB must use; none: they find no room.
MACHINES: dict[str, tuple[list[int], int, set[str]]] = {
    "8 x 24 GB, 64 GB of memory": ([24] * 8, 64, set()),
    "4 x 80 GB": ([80] * 4, 64, {"gpu"}),
    "2 x 80 GB, 256 GB of memory": ([80] * 2, 256, {"gpu", "cpu"}),
    "1 x 24 GB, 64 GB of memory": ([24], 64, set()),
}


@pytest.mark.parametrize("device_map", ["balanced", "sequential"])
@pytest.mark.parametrize("machine", MACHINES)
def test_whole_layers_on_described_machines(machine: str, device_map: str) -> None:
    """Against the bytes of the real network's tensors, counted one by one."""
    gpus, cpu, expected = MACHINES[machine]
    devices = tuple(Device(f"cuda:{i}", size * GB, 1e12, 25e9) for i, size in enumerate(gpus))
    described = Machine(devices, Device("cpu", cpu * GB, 50e9), Device("disk", 0, 3e9))
    plan = plan_load(official(), Stored(), described, LoadOptions(device_map=device_map, context=4096))
    if not expected:
        assert plan.fault is not None and "--offload disk" in plan.fault.one_line
        return
    places = plan.device_map
    assert {"cpu" if place == "cpu" else "gpu" for place in places.values()} == expected
    blocks = [name for name in places if name.startswith("transformer.blocks.")]
    assert [name.split(".")[2] for name in blocks] == [str(i) for i in range(40)]  # all, in order, none split
    with torch.device("meta"):
        network = DbrxForCausalLM(official()).to(torch.bfloat16)
    kv = 2 * 8 * 128 * 2 * 4096
    computed = Counter(place if place != "cpu" else "cuda:0" for name, place in places.items() if name in blocks)
    for device in (*devices, described.cpu):
        held = sum(_nbytes(network, name) for name, place in places.items() if place == device.name)
        assert held == plan.weights.get(device.name, 0)
        assert held + computed[device.name] * kv <= device.memory
    if expected == {"gpu"}:
        counts = [sum(places[name] == gpu.name for name in blocks) for gpu in devices]
        assert max(counts) - min(counts) <= 3 if device_map == "balanced" else counts[0] > counts[-1]


def _nbytes(network: DbrxForCausalLM, module: str) -> int:
    return sum(t.nbytes for name, t in network.state_dict().items() if name == module or name.startswith(module + "."))


def test_layers_move_in_order_and_change_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block on the CPU and two on the disk: each is brought before it runs and sent away after; same logits."""
    ids = torch.tensor([[11, 7, 5, 3, 2]])
    whole = DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    with torch.inference_mode():
        expected = whole(ids).logits

    moves: list[tuple[str, str]] = []
    for name in ("pre_forward", "post_forward"):
        original = getattr(AlignDevicesHook, name)

        def recorded(
            hook: AlignDevicesHook, module: Any, *rest: Any, _name: str = name, _run: Any = original, **kw: Any
        ) -> Any:
            if hook.offload:
                moves.append((_name, names[module]))
            return _run(hook, module, *rest, **kw)

        monkeypatch.setattr(AlignDevicesHook, name, recorded)
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    places = {"transformer.wte": "cpu", "transformer.norm_f": "cpu", "lm_head": "cpu"}
    places |= {f"transformer.blocks.{i}": "disk" if i else "cpu" for i in range(3)}
    dispatch(network, places, main_device="cpu", offload_dir=str(tmp_path))
    names = {module: name for name, module in network.named_modules()}
    with torch.inference_mode():
        assert torch.equal(network(ids).logits, expected)
    visited = [name for step, name in moves if step == "pre_forward"]
    assert {name.split(".")[2] for name in visited} == {"1", "2"}
    assert [name.split(".")[2] for name in visited] == sorted(name.split(".")[2] for name in visited)
    assert sorted(visited) == sorted(name for step, name in moves if step == "post_forward")


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_activations_go_where_a_layer_is(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, quantize: str) -> None:
    """Two cards, which are not here: nothing moves, and what accelerate's hooks would move is written down.

    A layer in floats that lies in the CPU's memory comes to the first card, as the plan says.
    """
    moved: list[tuple[str, str]] = []
    align = AlignDevicesHook.pre_forward

    def recorded(hook: AlignDevicesHook, module: Any, *rest: Any, **kw: Any) -> Any:
        moved.append((names[module], str(hook.execution_device)))
        return align(hook, module, *rest, **kw)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", recorded)
    monkeypatch.setattr("accelerate.hooks.set_module_tensor_to_device", lambda *args, **options: None)
    monkeypatch.setattr("accelerate.hooks.send_to_device", lambda value, device, **options: value)
    ids = torch.tensor([[11, 7, 5, 3, 2]])
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32", quantize=quantize)
    with torch.inference_mode():
        expected = network(ids).logits
        last = "cuda:1" if quantize == "int8" else "cpu"
        places = {"transformer.wte": "cuda:0", "transformer.norm_f": last, "lm_head": last}
        places |= {f"transformer.blocks.{i}": place for i, place in enumerate(("cuda:0", "cuda:1", last))}
        dispatch(network, {module: torch.device(place) for module, place in places.items()})
        names = {module: name for name, module in network.named_modules()}
        assert torch.equal(network(ids).logits, expected)
    computed = dict(reversed(moved))  # of each module its first place
    assert {module: computed.get(module) for module in places} == {
        module: "cuda:0" if place == "cpu" else place for module, place in places.items()
    }


@pytest.mark.slow
def test_a_map_from_a_file(cli: Cli, small_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    plan = json.loads(cli("plan", small_checkpoint, "--json").out)
    file.write_text(json.dumps(plan["device_map"]))
    args = ("generate", "-m", small_checkpoint, "-t", "0", "-n", "4", "hi")
    assert cli(*args, "--device-map", file).out == cli(*args).out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "map.json: is not valid JSON"),
        ("[]", "map.json: is not a JSON object"),
        ('{"": true}', "map.json: '' must be a device, not True"),
        ('{"": -1}', "map.json: '' must be a device, not -1"),
        ('{"": "cpu", "": "cpu"}', "map.json: .*the key '' occurs twice"),
        ("[" * 100, "map.json: is not valid JSON"),
        ("[" * 100 + "]" * 100, "map.json: is nested too deeply"),
        ('{"lm_head": null}', "map.json: 'lm_head' must be a device, not None"),
        ('{"lm_head": "cpu"}', "names no device for transformer.wte.weight"),
        ('{"": "cuda:7"}', "there is no device"),
        ('{"": "moon"}', "is not a device"),
    ],
)
def test_a_map_that_does_not_fit(tiny_checkpoint: Path, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "map.json"
    file.write_text(content)
    with pytest.raises(DbrxError, match=message):
        DbrxForCausalLM.from_pretrained(tiny_checkpoint, device_map=str(file))


def test_a_map_that_is_not_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        DbrxForCausalLM.from_pretrained(tiny_checkpoint, device_map=str(tmp_path / "none.json"))


def test_too_little_memory_names_what_helps(tiny_checkpoint: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        DbrxForCausalLM.from_pretrained(tiny_checkpoint, device_map="auto", max_memory={"cpu": "1MB"})
    assert "--offload disk" in caught.value.one_line


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_on_a_gpu(tiny_checkpoint: Path, device_map: str) -> None:
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, device_map=device_map)
    with torch.inference_mode():
        assert network(torch.tensor([[1, 2, 3]], device=network.device)).logits.device.type == "cuda"
