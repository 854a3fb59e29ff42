"""The kernels for cards, run by Triton's interpreter: each is compared with float64.

The interpreter is chosen when Triton is imported, so these tests run in a process of their own: `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.cli import ROOT
from tests.forks import Forks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


ENVIRONMENT = {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
COMMAND = ["-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:anyio", "tests/interpreted_kernels.py"]


def run(*args: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    """`tests/interpreted_kernels.py` in a process of its own."""
    variables = {**os.environ, **ENVIRONMENT, **({"TRITON_INTERPRET": "1"} if interpret else {})}
    command = [sys.executable, "-m", "pytest", *COMMAND, *args]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_kernels_agree_with_float64(forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, "TRITON_INTERPRET": "1"}.items():
        monkeypatch.setenv(name, value)
    done = forks.start(*COMMAND, module="pytest")  # Torch is there, Triton not yet
    assert done.wait() == 0, done.out.decode()[-5000:] + done.err[-2000:]


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_many_shapes_and_a_network_agree_with_float64() -> None:
    done = run("-m", "soak", "-o", "addopts=")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture
def _compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds what it compiled before by its sources and its version, so another run takes two seconds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


# Each kernel once, and each form but the other groups of int4, which take longest to compile.
ONE_FORM = [("gate_up", "bfloat16"), ("down", "int4 g32"), ("Wqkv, 8 tokens", "int8")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "only"),
    [
        *(pytest.param(90, [each], id=f"90-{each[0]}") for each in ONE_FORM),
        *(pytest.param(arch, None, id=f"{arch}-all", marks=pytest.mark.soak) for arch in (80, 89, 90, 100, 120)),
    ],
)
@pytest.mark.usefixtures("_compiler")
def test_products_compile_for_cards_that_are_not_here(arch: int, only: list[tuple[str, str]] | None) -> None:
    """Weights are loaded 128 bits at a time, threads exchange nothing in the loop, and no register is spilled."""
    from tests.cuda_offline import CARDS, compile_all

    made = list(compile_all(arch, only))
    assert len(made) == (1 if only else 12)
    for each in made:
        assert each.spilled == each.barriers == 0, each
        assert each.wide >= 4 and each.shared < 48 * 1024 < CARDS[arch].shared, each


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.soak) for arch in (80, 89, 100, 120))])
@pytest.mark.usefixtures("_compiler")
def test_other_kernels_compile_for_cards_that_are_not_here(arch: int) -> None:
    from tests.cuda_offline import compile_others

    others = list(compile_others(arch))
    assert len(others) == 6
    for name, usage, wide in others:
        assert usage["STACK"] == usage["LOCAL"] == 0 < wide and usage["SHARED"] < 48 * 1024, (name, usage)


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_on_a_card() -> None:
    """The same answers, with the tiles that are used there; and 200 shapes, and a network.

    Each shape is compiled anew, some 400 kernels of two seconds: hence a process for each core.
    """
    done = run("-o", "addopts=", "-W", "default", "-n", "auto", "--dist", "worksteal", interpret=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


class Hurries(TorchFunctionMode):
    """Refuses whatever asks a tensor for its numbers, which on a card is to wait for it."""

    WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__", "__float__")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in self.WAITS or (name == "tensor" and kwargs.get("device") is not None):  # copied from plain memory
            raise AssertionError(f"{name} waits for the card")
        return function(*args, **kwargs)


class Recorded:
    """In the place of a kernel: what is launched, on the card of its arguments, which must be the current one."""

    current = 0  # guards that are open

    def __init__(self, name: str, launches: list[tuple[str, tuple[int, ...]]]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            assert Recorded.current > 0, f"{self.name} is launched on whatever card is the current one"
            assert constants["enable_fp_fusion"], f"what {self.name} becomes changes with Triton's version"
            self.launches.append((self.name, grid))

        return launch


@contextmanager
def guard(like: torch.Tensor) -> Iterator[None]:
    """In the place of `torch.cuda.device_of`."""
    Recorded.current += 1
    yield
    Recorded.current -= 1


@pytest.mark.parametrize("tokens", [1, 8])
def test_the_experts_of_a_step_wait_for_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches and no number asked for: ids and weights stay where they are."""
    from model.kernels import cuda_glu, cuda_linear
    from model.weights import FloatExpert

    launches: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(cuda_glu, "gate_up_kernel", Recorded("gate_up", launches))
    monkeypatch.setattr(cuda_glu, "down_kernel", Recorded("down", launches))
    monkeypatch.setattr(cuda_linear, "gemv_kernel", Recorded("gemv", launches))
    monkeypatch.setattr(torch.cuda, "device_of", guard)
    linear = cuda_linear.CudaLinear("int4", 32, "cpu")
    glu = cuda_glu.CudaGlu(linear, "silu")
    held = glu.stack([glu.pack(FloatExpert(*(torch.randn(64, 32) for _ in range(3)))) for _ in range(4)])
    matrix = linear.pack(torch.randn(100, 32))
    x, weights = (torch.randn(tokens, n) for n in (32, 2))
    ids = torch.zeros(tokens, 2, dtype=torch.long)
    with Hurries():
        with pytest.raises(AssertionError, match="waits for the card"):
            ids.tolist()
        assert glu.forward(x, ids, weights, held).shape == (tokens, 32)
        assert linear.run(linear.prepare(x), matrix).shape == (tokens, 100)
    assert launches == [("gate_up", (2 * tokens, 8)), ("down", (tokens, 2)), ("gemv", (7 if tokens == 1 else 2,))]


def test_a_recording_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step is launched, as all later ones, on the stream that there was; and the reason is told."""
    from model.kernels.cuda_block import CudaBlocks, Inputs

    answer, current, tried = (torch.ones(1, 2), torch.ones(1, 1, 2)), ["own"], []

    @contextmanager
    def stream(name: str) -> Iterator[None]:
        before, current[0] = current[0], name
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def graph(graph: object) -> Iterator[None]:
        """As PyTorch has it: where the end of a recording fails its stream stays the current one."""
        current[0] = "recording"
        yield
        raise RuntimeError("operation failed due to a previous error during capture\nand more")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    steps = CudaBlocks.__new__(CudaBlocks)
    steps.records, steps.fault, steps.inputs = True, "", {}
    monkeypatch.setattr(steps, "_compute", lambda inputs: tried.append(current[0]) or answer)
    inputs = Inputs(*[torch.empty(1, 2)] * 5, [])  # type: ignore[arg-type]
    for _ in range(2):
        assert steps._replay(inputs)[0] is answer[0]
    assert tried == ["own", "recording", "own"]
    assert steps.graph == "off, it could not be recorded: operation failed due to a previous error during capture"


def test_a_step_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine launches a layer, and of the ids of two rows none is asked for before the next step has begun."""
    from model import DbrxForCausalLM, SamplingParams, packing, scheduler
    from model.formats import open_weights
    from model.formats.write_quantized import Writer
    from model.kernels import cuda_block, cuda_glu, cuda_linear
    from model.sequence import Sequence
    from tests.weights import make_checkpoint

    launches: list[tuple[str, tuple[int, ...]]] = []
    names = {cuda_glu: ("gate_up", "down"), cuda_linear: ("gemv",)}
    names[cuda_block] = ("norm", "append", "attend", "merge", "router")
    for module, kernels in names.items():
        for name in kernels:
            monkeypatch.setattr(module, f"{name}_kernel", Recorded(name, launches))
    monkeypatch.setattr(torch.cuda, "device_of", guard)
    config: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 40, "max_seq_len": 64}
    config["attn_config"] = {"kv_n_heads": 2, "rope_theta": 500000}
    config["ffn_config"] = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    with open_weights(make_checkpoint(tmp_path / "floats", config, 7)) as floats:
        Writer(floats, tmp_path / "int4", "int4", 32).write(lambda _: None)
    monkeypatch.setattr(packing, "choose", lambda name, group, device: cuda_linear.CudaLinear(name, group or 0, "cpu"))
    monkeypatch.setattr(packing, "experts_of", cuda_glu.CudaGlu)
    network = DbrxForCausalLM.from_pretrained(tmp_path / "int4", dtype="float32")
    cuda_block.decode_on_card(network, records=False)  # --graph off
    step = network.transformer.at_once
    assert isinstance(step, cuda_block.CudaBlocks) and step.graph == "off"
    monkeypatch.setattr(torch, "empty", torch.zeros)  # nothing is computed; what there was may be no number
    batch = scheduler.Scheduler(network, 2)
    for id, temperature in ((1, 0.0), (2, 1.0)):
        batch.add(Sequence([id], SamplingParams(temperature, 0.9, 5, 0.01, max_tokens=9), logit_bias={2: 1.0}))
    while batch._ahead is None or len(batch._ahead.rows) < 2:
        batch.step()
    launches.clear()

    def read(coming: scheduler.Coming) -> list[list[int]]:
        launches.append(("read", ()))
        with torch._C.DisableTorchFunction():
            return coming._numbers.tolist()

    monkeypatch.setattr(scheduler.Coming, "read", read)
    with Hurries():
        assert len(batch.step()) == 2
    layer = [
        ("norm", (2,)),
        ("gemv", (1,)),
        ("append", (2, 2)),
        ("attend", (2, 2, cuda_block.SPLITS)),
        ("merge", (2, 4)),
    ]
    names_of_layer = [*(name for name, _ in layer), "gemv", "router", "gate_up", "down"]
    assert [name for name, _ in launches] == [*2 * names_of_layer, "gemv", "read"]
    assert launches[:5] == layer
