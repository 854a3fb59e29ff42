"""Memory that runs out at any call: sizes in the message, the next turn works, and the memory comes back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_cli.engine import Done, Request
from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.engine.memory import memory_fault
from dbrx_cli.options import ModelOptions, OutputOptions
from dbrx_cli.report import Report
from model import DbrxForCausalLM, Message, SamplingParams
from model.errors import ResourceError
from model.kernels.native_linear import NativeLinear
from model.kv_cache import KVCache, KVRow
from tests.cli import Cli

pytestmark = pytest.mark.slow  # whole runs and sessions

torch.set_num_threads(1)

CPU = (
    "[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 5000000000 bytes. Error code 12 (Cannot allocate memory)"
)
FAULTS: list[Callable[[], Exception]] = [
    lambda: RuntimeError(CPU),
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError,
]


class Failing:
    """A function that raises at its n-th call from now on."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.left = -1
        self.error: Callable[[], Exception] = MemoryError

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            raise self.error()
        return self.real(*args, **options)


def ask(engine: LocalEngine, text: str) -> Done:
    params = SamplingParams(temperature=0, max_tokens=3, repetition_penalty=1.2)
    *_, done = engine.stream(Request([Message("user", text)], params))
    assert isinstance(done, Done)
    return done


def tensor_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


@pytest.mark.parametrize("where", [(NativeLinear, "run"), (KVRow, "pointers")], ids=["product", "cache"])
def test_at_every_call(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]) -> None:
    """Each product, or each look for room in the cache, fails once: in prefill, in decode, with another turn kept."""
    engine = LocalEngine.load(ModelOptions(model=str(tiny_checkpoint)), Report(OutputOptions(quiet=True)))
    expected = ask(engine, "Hello?").token_ids
    before = tensor_bytes()
    failing = Failing(getattr(*where))
    monkeypatch.setattr(*where, lambda *args: failing(*args))
    failing.left = calls = 10**6
    ask(engine, "How deep is the sea?")
    calls -= failing.left
    assert calls >= 3
    for n in range(calls):
        failing.left, failing.error = n, FAULTS[n % 3]
        with pytest.raises(ResourceError, match=r"weights take \d.*keys and values of \d+ tokens") as fault:
            ask(engine, "How deep is the sea?")
        assert fault.value.exit_code == 5 and ("5.0 GB more" in fault.value.message) == (n % 3 == 0)
        del fault
        assert ask(engine, "Hello?").token_ids == expected
        if n % 10 == 0:
            assert abs(tensor_bytes() - before) <= 0.01 * before


def test_another_runtime_error_is_not_taken_for_it(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine.load(ModelOptions(model=str(tiny_checkpoint)), Report(OutputOptions(quiet=True)))
    failing = Failing(torch.nn.functional.linear)
    failing.left, failing.error = 2, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(torch.nn.functional, "linear", failing)
    with pytest.raises(RuntimeError, match="shapes"):
        ask(engine, "How deep is the sea?")
    assert ask(engine, "How deep is the sea?").finish_reason == "length"


def test_generate_ends_with_5(cli: Cli, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(torch.nn.functional.linear)
    failing.left, failing.error = 2, FAULTS[0]
    monkeypatch.setattr(torch.nn.functional, "linear", failing)
    result = cli("generate", "-m", tiny_checkpoint, "hi")
    assert result.code == 5 and "5.0 GB more were wanted; shorten the prompt" in result.fault


def test_weights_that_are_packed_count(tiny_checkpoint: Path) -> None:
    """They are no parameters, and most of a model."""
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, quantize="int8", pack=True)
    assert network.load_plan is not None
    fault = memory_fault(MemoryError("out of memory"), network, KVCache(3))
    assert fault is not None and f"the weights take {network.load_plan.sizes.total / 1e6:.1f} MB" in fault.message
