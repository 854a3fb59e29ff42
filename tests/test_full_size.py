"""The rehearsal at full size: DBRX's real shapes in sparse files, streamed; and the same in small."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.causal_lm import DbrxForCausalLM
from model.formats.databricks import DatabricksWeights
from model.kv_cache import KVCache
from model.prefill import prefill
from model.weights import Extent
from tests import full_size
from tests.cli import ROOT, environment

pytestmark = pytest.mark.slow  # whole runs and sessions

SMALL = full_size.REAL | {
    "d_model": 1536,
    "n_heads": 12,
    "n_layers": 6,
    "vocab_size": 64,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 16, "moe_top_k": 4, "moe_jitter_eps": 0},
}
GIB = 2**30


@pytest.fixture(scope="module")
def numbers() -> full_size.Numbers:
    return full_size.Numbers.of(SMALL, tokens=(3, 60, 17, 8))


def test_int3_answers_what_the_few_numbers_say(tmp_path: Path) -> None:
    numbers = full_size.Int3Numbers.of(SMALL, tokens=(3, 60, 17, 8))
    folder = full_size.make(tmp_path / "int3", numbers, shard_size=2 * 10**6)
    for token in numbers.tokens:
        assert np.abs(logits(folder, numbers, token) - numbers.logits(token)).max() < 1e-3
    whole = full_size.Numbers.of(SMALL, numbers.tokens)
    assert any(np.abs(whole.logits(t) - numbers.logits(t)).max() > 1e-2 for t in numbers.tokens)  # experts count


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, numbers: full_size.Numbers) -> Path:
    return full_size.make(tmp_path_factory.mktemp("full") / "size", numbers, shard_size=12 * 10**6)


def logits(folder: Path, numbers: full_size.Numbers, token: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    network = DbrxForCausalLM.from_pretrained(folder, offload="disk", expert_cache=10 * 2**20, dtype="float32")
    found = prefill(network, torch.tensor([[token]]), KVCache(SMALL["n_layers"]))[0]
    return found[list(numbers.tokens)].double().numpy()


def test_the_network_answers_what_the_few_numbers_say(small: Path, numbers: full_size.Numbers) -> None:
    assert len(list(small.glob("*.safetensors"))) > 6
    for token in numbers.tokens:
        assert np.abs(logits(small, numbers, token) - numbers.logits(token)).max() < 1e-5
    assert numbers.greedy(3, 5) == [60, 17, 8, 3, 60]


@pytest.mark.parametrize("fault", ["an expert", "a row", "a block", "w2 as w1"])
def test_a_wrong_slice_shows(
    small: Path, numbers: full_size.Numbers, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = DatabricksWeights.expert_extents

    def wrong(self: DatabricksWeights, layer: int, expert: int) -> tuple[Extent, ...]:
        w1, v1, w2 = right(self, layer, expert)
        if fault == "w2 as w1":
            return w1, v1, w1
        shift = {"an expert": w1.nbytes, "a row": 2 * SMALL["d_model"], "a block": 4096}[fault]
        return tuple(replace(e, start=e.start - shift * (expert > 0)) for e in (w1, v1, w2))

    monkeypatch.setattr(DatabricksWeights, "expert_extents", wrong)
    assert any(np.abs(logits(small, numbers, t) - numbers.logits(t)).max() > 1e-2 for t in numbers.tokens)


# The real shapes: 263 GB of addresses, 9.5 GB of memory and more; one after the other, with nothing else running.

PROMPT = " test"  # one token


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_size.make(tmp_path_factory.mktemp("real") / "dbrx", full_size.Numbers.of(full_size.REAL))


@pytest.fixture(scope="session")
def real_int3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_size.make(tmp_path_factory.mktemp("real") / "dbrx-int3", full_size.Int3Numbers.of(full_size.REAL))


def generate(folder: Path, *more: str) -> subprocess.Popen[str]:
    """`dbrx generate` on the rehearsal, under GNU time where there is one."""
    command = [sys.executable, "-m", "dbrx_cli", "generate", "-m", str(folder), "--raw", "-t", "0", PROMPT]
    options = ["--offload", "disk", "--expert-cache", "2500MiB", "--json", "-v", *more]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *options], env=environment(OMP_NUM_THREADS="2"), cwd=ROOT, **pipes)


@pytest.mark.bench
@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", ["real", "real_int3"])
def test_the_first_tokens_at_full_size(form: str, request: pytest.FixtureRequest) -> None:
    process = generate(request.getfixturevalue(form), "-n", "3", "--logprobs", "8")
    peak = max(_resident(process))
    out, err = process.communicate()
    assert process.returncode == 0, err
    reply = json.loads(out)
    print(f"peak {peak / 1e9:.2f} GB", json.dumps(reply["timings"]), json.dumps(reply["experts"]), err, sep="\n")
    numbers = (full_size.Int3Numbers if form == "real_int3" else full_size.Numbers).of(full_size.REAL)
    token = full_size.TOKENS[-1]
    assert reply["token_ids"] == numbers.greedy(token, 3)
    for told in reply["logprobs"]:
        scores = numbers.logits(token)
        total = np.log(np.exp(scores).sum() + full_size.REAL["vocab_size"] - len(scores))
        expected = dict(zip(numbers.tokens, scores - total, strict=True))
        for entry in told["top"]:
            if entry["token_id"] in expected:
                assert entry["logprob"] == pytest.approx(expected[entry["token_id"]], abs=0.15)
        token = told["token_id"]
    assert peak < 14e9
    assert reply["timings"]["load_s"] < 60


@pytest.mark.bench
@pytest.mark.timeout(600)
def test_an_interruption_at_full_size_takes_less_than_a_second(real: Path) -> None:
    process = generate(real, "-n", "3")
    assert process.stderr is not None and process.stdout is not None
    for line in process.stderr:
        if "loaded" in line:
            break
    time.sleep(8)  # in the middle of the first token
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    reply = json.loads(process.stdout.readline())
    took = time.monotonic() - start
    process.communicate()
    print(f"interrupted in {took:.2f} s, all memory given back after {time.monotonic() - start:.2f} s")
    assert reply["finish_reason"] == "interrupted" and process.returncode == 130 and took < 1


def _resident(process: subprocess.Popen[str]) -> Iterator[int]:
    """Bytes of memory of a process, ten times a second until it ends."""
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        yield int(peak[1]) * 1024 if peak else 0
        time.sleep(0.1)
    yield 0
