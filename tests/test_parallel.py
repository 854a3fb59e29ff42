"""Tensor parallel: real ranks under torchrun against one process; slices against the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from model.causal_lm import DbrxForCausalLM
from model.errors import InputError
from model.formats import open_weights
from model.formats.write_quantized import Writer
from model.parallel import Ranks, ShardedWeights, join
from model.weights import QuantizedExpert, QuantizedMatrix
from tests.cli import ROOT, Cli, environment
from tests.conftest import TINY
from tests.forks import FileFork, Forks
from tests.weights import make_checkpoint

PROMPT = "A prompt of a few words, and then some."


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the tiny checkpoint, with four key and value heads: it divides by 2 and 4."""
    config = {**TINY, "d_model": 64, "n_heads": 8}
    config["attn_config"] = {**config["attn_config"], "kv_n_heads": 4}  # type: ignore[dict-item]
    config["ffn_config"] = {**config["ffn_config"], "ffn_hidden_size": 128}  # type: ignore[dict-item]
    folder = tmp_path_factory.mktemp("parallel") / "four"
    make_checkpoint(folder, config, seed=3, dtype="float32", shards=2)
    return folder


def torchrun(ranks: int, *args: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    return subprocess.run(
        [*command, "-m", "dbrx_cli", *map(str, args)],
        input=stdin, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


@pytest.fixture
def two_ranks(forks: Forks, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[FileFork]]]:
    """Ranks with what torchrun tells them, and without the seconds that its own start takes."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def start(*args: str | Path) -> list[FileFork]:
        ranks = []
        with monkeypatch.context() as env:
            for rank in "01":
                for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, **told}.items():
                    env.setenv(name, value)
                env.setenv("TORCHELASTIC_RUN_ID", "run")
                ranks.append(forks.start(*args))
        return ranks

    yield start
    del store


TOGETHER = ("-t", "0", "-n", "24", "--json")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
def test_ranks_together_give_the_tokens_of_one(
    cli: Cli, four_heads: Path, tmp_path: Path, two_ranks: Callable[..., list[FileFork]], form: str
) -> None:
    """In few bits each has its slices of what is stored, for the same kernels as one process."""
    folder = four_heads
    if form != "float32":
        folder = tmp_path / form
        with open_weights(four_heads) as floats:
            Writer(floats, folder, form, 32).write(lambda _: None)
    args = ("generate", "-m", folder, *TOGETHER, PROMPT)
    first, second = two_ranks(*args)
    alone = json.loads(cli(*args).out)
    assert (first.wait(), second.wait(), second.out) == (0, 0, b""), first.err
    reply = json.loads(first.out)
    assert reply["token_ids"] == alone["token_ids"] and reply["usage"] == alone["usage"]


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_torchrun_give_the_tokens_of_one(cli: Cli, four_heads: Path, ranks: int) -> None:
    args = ("generate", "-m", four_heads, *TOGETHER)
    alone = json.loads(cli(*args, PROMPT).out)
    together = torchrun(ranks, *args, stdin=PROMPT)
    assert together.returncode == 0, together.stderr
    reply = json.loads(together.stdout)
    assert reply["token_ids"] == alone["token_ids"] and reply["usage"] == alone["usage"]


@pytest.mark.slow
def test_a_model_that_does_not_divide(tiny_checkpoint: Path, two_ranks: Callable[..., list[FileFork]]) -> None:
    ranks = two_ranks("generate", "-m", tiny_checkpoint, "-n", "2", "hi")
    assert all(rank.wait() != 0 and rank.out == b"" for rank in ranks)
    assert "do not divide by 2 ranks" in ranks[0].err


@pytest.mark.soak
def test_a_fault_of_the_leader_ends_all(four_heads: Path) -> None:
    result = torchrun(2, "generate", "-m", four_heads, "--top-p", "7", "hi")
    assert result.returncode != 0 and "top_p must be" in result.stderr


def test_slices_make_the_whole(four_heads: Path) -> None:
    """Each tensor's slices, put together along the dimension that is split, are the tensor; experts likewise."""
    with open_weights(four_heads) as whole:
        parts = [ShardedWeights(whole, Ranks(rank, 4, rank)) for rank in range(4)]
        block = "transformer.blocks.1."
        name = block + "norm_attn_norm.attn.out_proj.weight"
        assert torch.equal(torch.cat([part.read(name) for part in parts], dim=1), whole.read(name))
        name = block + "norm_attn_norm.attn.Wqkv.weight"
        q, k, v = zip(*(part.read(name).split([16, 8, 8]) for part in parts), strict=True)
        assert torch.equal(torch.cat([*q, *k, *v]), whole.read(name))
        experts = zip(*(part.expert(1, 5) for part in parts), strict=True)
        for slices, matrix in zip(experts, whole.expert(1, 5), strict=True):
            assert torch.equal(torch.cat(slices), matrix)
        assert torch.equal(torch.cat([part.expert_matrix(1, 5, 2) for part in parts]), whole.expert(1, 5).w2)
        name = block + "ffn.experts.mlp.w2"
        stacked = [part.read(name).view(16, 32, 64) for part in parts]
        assert torch.equal(torch.cat(stacked, dim=1).flatten(0, 1), whole.read(name))
        names = DbrxForCausalLM(whole.config).state_dict()
        split = [n for n in names if ".attn." in n or ".experts." in n]
        assert sum(part.nbytes_of(n) for part in parts for n in split) == sum(map(whole.nbytes_of, split))


def test_quantized_slices() -> None:
    values = torch.arange(64, dtype=torch.int8).view(8, 8)
    matrix = QuantizedMatrix(values, torch.rand(8, 4), torch.rand(8, 4))

    class Stored:
        config = source = kept = None
        quantization, group = "int4", 2
        plain_experts = False

        def quantized_expert(self, *_: object) -> QuantizedExpert:
            return QuantizedExpert(matrix, matrix, matrix)

    halves = [ShardedWeights(Stored(), Ranks(rank, 2, rank)).quantized_expert(0, 0) for rank in (0, 1)]  # type: ignore[arg-type]
    for part in ("values", "scale", "zero"):
        assert torch.equal(torch.cat([getattr(half.w1, part) for half in halves]), getattr(matrix, part))
        assert torch.equal(torch.cat([getattr(half.w2, part) for half in halves], dim=1), getattr(matrix, part))
    with pytest.raises(InputError):
        ShardedWeights(Stored(), Ranks(0, 3, 0)).quantized_expert(0, 0)  # type: ignore[arg-type]


def test_alone_there_are_no_ranks() -> None:
    assert join() is None


NOT_SPLIT = {
    "--batch": ("generate", "--batch", "prompts.jsonl"),
    "--prompt-cache": ("generate", "--prompt-cache", "cache", "hi"),
    "--resume": ("generate", "--resume", "reply", "hi"),
    "--quantize": ("generate", "--quantize", "int8", "hi"),
    "--device-map": ("generate", "--device-map", "cpu", "hi"),
    "--offload": ("chat", "--offload", "disk"),
    "--expert-cache": ("generate", "--expert-cache", "1GiB", "hi"),
    "dbrx bench": ("bench",),
}


@pytest.mark.parametrize("what", NOT_SPLIT)
def test_what_needs_a_single_process_is_refused(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """At once: by rank 0, before it meets the others or reads a weight."""
    for name, value in {"TORCHELASTIC_RUN_ID": "run", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    command, *options = NOT_SPLIT[what]
    result = cli(command, "-m", tiny_checkpoint, *options)
    assert result.code == 2 and result.out == ""
    assert result.fault == f"dbrx: {what} needs a single process that has the whole model; run it without torchrun"
    assert not list(tmp_path.glob("cache*")) and not list(tmp_path.glob("reply*"))
