"""`dbrx serve --engine vllm` without vLLM: the command line, refusals, names of weights, what entry points import."""

from __future__ import annotations

import json
import os
import socket
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dbrx_cli.addresses import listen
from dbrx_cli.vllm_plugin import launch
from dbrx_cli.vllm_plugin.weights import experts, place
from model.chat_template import CHATML
from model.config import DbrxConfig
from model.tokenizer import Tokenizer
from tests.cli import ROOT, Cli
from tests.test_imports import loaded_by
from tests.test_tokenizer_files import check_read_alike

LISTEN = "dbrx_cli.addresses.listen"


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Runs of `dbrx serve` that end where vLLM would begin; an environment that seems to have vLLM and the plugin."""
    seen: list[Any] = []

    def execve(path: str, words: list[str], env: dict[str, str]) -> None:
        seen.append((path, words, env))

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(launch, "LOOK", "print(True, True)")
    monkeypatch.setattr(LISTEN, lambda host, port: socket.socket())
    monkeypatch.setenv("DBRX_CACHE", str(tmp_path / "cache"))
    return seen


@pytest.fixture
def small(small_checkpoint: Path) -> Path:
    return small_checkpoint


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


def flags_of(words: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in pairwise(words) if flag.startswith("--")}


def test_the_command_line(cli: Cli, became: list[Any], small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBRX_API_KEY", "secret")
    run = ["serve", "--engine", "vllm", "-m", small, "--tensor-parallel-size", "2", "--context", "256"]
    assert cli(*run, "--", "--enforce-eager").code == 0
    ((path, words, env),) = became
    assert path == words[0] == sys.executable
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and words[-1] == "--enforce-eager"
    flags = flags_of(words)
    beside = Path(flags["--tokenizer"])
    assert flags | {"--tokenizer": "", "--generation-config": ""} == {
        "--model": str(small), "--served-model-name": "small", "--host": "127.0.0.1", "--port": "8000",
        "--tokenizer": "", "--generation-config": "", "--dtype": "auto", "--max-model-len": "256",
        "--tensor-parallel-size": "2", "--pipeline-parallel-size": "1",
    }  # fmt: skip
    assert flags["--generation-config"] == str(beside)
    # No key where others could read it; nothing is fetched and nothing reported.
    assert "secret" not in " ".join(words) and env["VLLM_API_KEY"] == "secret"
    assert (env["HF_HUB_OFFLINE"], env["VLLM_NO_USAGE_STATS"]) == ("1", "1")


def test_tokenizer_template_and_both_ends_lie_beside(small: Path, became: list[Any]) -> None:
    folder = launch.companions(small)
    assert launch.companions(small) == folder and os.listdir(folder.parent) == [folder.name], "made once"
    ours = Tokenizer.from_folder(small)
    check_read_alike(folder, ours)
    assert Tokenizer.from_folder(folder).chat_template.text == CHATML
    assert DbrxConfig.from_json(folder / "config.json") == DbrxConfig.from_json(small / "config.json")
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["eos_token_id"] == [256, ours.special_tokens["<|im_end|>"]]


def test_nodes_behind_the_first_serve_nobody() -> None:
    more = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--headless")
    serving = launch.Serving("x", "127.0.0.1", 8000, "auto", None, 2, 1, more)
    words = launch.command("python", Path("/m"), Path("/beside"), serving)
    assert words[:5] == ["python", "-m", "vllm.entrypoints.cli.main", "serve", "/m"]
    assert tuple(words[-7:]) == more and "--max-model-len" not in words


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--engine", "vllm", "--parallel", "2"], "--parallel has no effect with --engine vllm; flags of vLLM's own"),
        (["--engine", "vllm", "--quantize", "int8"], "--quantize has no effect with --engine vllm"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size needs --engine vllm; leave it out"),
        (["small"], "small is no flag of this server's; -m names the model"),
        (["--timeout", "soon"], "--timeout soon is no length of time; give one such as 90s, 30m or 1h"),
    ],
)
def test_flags_of_the_other_engine_are_told(cli: Cli, flags: list[str], said: str) -> None:
    told = cli("serve", *flags)
    assert told.code == 2 and said in told.fault


@pytest.mark.parametrize(
    ("has", "said"), [("False True", "has no vLLM; "), ("True False", "does not know this program's DBRX; ")]
)
def test_an_environment_that_lacks_something_is_told(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, has: str, said: str
) -> None:
    monkeypatch.setattr(launch, "LOOK", f"print('{has}')")
    told = cli("serve", "--engine", "vllm", "-m", "nothing")
    assert told.code == 3 and said in told.fault and "pip install" in told.fault


def test_an_interpreter_that_is_none(cli: Cli) -> None:
    told = cli("serve", "--engine", "vllm", "--python", "/no/python")
    assert told.code == 2 and "--python /no/python is no Python" in told.fault


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["small"], "small is no flag of vLLM's; -m names the model"),
        (["--tensor-parallel-size", "4"], "--tensor-parallel-size 4 does not divide 6 heads, 1 of keys and values"),
        (["--pipeline-parallel-size", "4"], "--pipeline-parallel-size 4: the model has 3 layers"),
        (["--context", "641"], "--context 641: the model was made for 640 tokens"),
    ],
)
def test_wrong_words_are_told_before_vllm_starts(
    cli: Cli, became: list[Any], small: Path, flags: list[str], said: str
) -> None:
    told = cli("serve", "--engine", "vllm", "-m", small, *flags)
    assert told.code == 2 and not became and said in told.fault


def test_a_taken_port_is_told(cli: Cli, became: list[Any], small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LISTEN, listen)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = ["serve", "--engine", "vllm", "-m", small, "--port", port]
        told = cli(*run)
        assert told.code == 2 and f"--host 127.0.0.1 --port {port}: Address already in use" in told.fault
        told = cli(*run, "--host", "203.0.113.1")  # reserved for documentation: no machine's own
        assert told.code == 2 and f"--host 203.0.113.1 --port {port}: Cannot assign" in told.fault
        assert not became
        assert cli(*run, "--", "--headless").code == 0, "a node behind the first listens to nobody"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_folders_are_refused_by_name(
    cli: Cli, became: list[Any], tmp_path: Path, small: Path, kind: str
) -> None:
    folder = tmp_path / kind
    assert cli("quantize", small, folder, "--to", kind, "-q").code == 0
    told = cli("serve", "--engine", "vllm", "-m", folder)
    assert told.code == 3 and not became
    assert told.fault.startswith(f"dbrx: {folder}: holds {kind} weights of dbrx, which vLLM does not read; serve the")
    assert f"dbrx convert {folder} FOLDER --to bfloat16" in told.fault


def test_a_gguf_file_is_refused_by_name(cli: Cli, became: list[Any], tmp_path: Path, small: Path) -> None:
    file = tmp_path / "tiny.gguf"
    assert cli("export", file, "-m", small, "--type", "f32", "-q").code == 0
    told = cli("serve", "--engine", "vllm", "-m", file)
    assert told.code == 3 and "holds weights in a GGUF file, which vLLM does not read" in told.fault


@pytest.mark.parametrize("inside", ["", "routed_experts.", "base_layer.routed_experts."])
def test_experts_go_to_the_module_that_is_there(inside: str) -> None:
    head = "transformer.blocks.1.ffn.experts"
    names = [f"{head}.{inside}{leaf}" for leaf in ("w13_weight", "w2_weight")]
    names = ["transformer.blocks.11.ffn.experts.w13_weight", "transformer.blocks.0.ffn.experts.w2_weight", *names]
    assert place(f"{head}.mlp.w1", names) == (f"{head}.{inside}w13_weight", "w1")
    assert place(f"{head}.mlp.v1", names) == (f"{head}.{inside}w13_weight", "w3")
    assert place(f"{head}.mlp.w2", names) == (f"{head}.{inside}w2_weight", "w2")
    assert place("transformer.blocks.1.ffn.router.layer.weight", names) is None
    with pytest.raises(KeyError, match=r"blocks\.2\.ffn\.experts\.mlp\.w1"):
        place("transformer.blocks.2.ffn.experts.mlp.w1", names)


def test_an_expert_of_vllms_matrices_computes_the_same() -> None:
    """down(silu(gate(x)) * up(x)) of vLLM's matrices against DBRX's formula in float64."""
    count, hidden, width = 3, 5, 4
    w1, v1, w2 = np.random.default_rng(0).normal(size=(3, count * hidden, width))
    x = np.random.default_rng(1).normal(size=width)
    gates, ups, downs = (
        list(experts(torch.from_numpy(w), part, count)) for w, part in ((w1, "w1"), (v1, "w3"), (w2, "w2"))
    )
    for i in range(count):
        rows = slice(i * hidden, (i + 1) * hidden)
        gate, up = x @ w1[rows].T, x @ v1[rows].T
        wanted = (gate / (1 + np.exp(-gate)) * up) @ w2[rows]
        t = torch.from_numpy(x)
        found = downs[i] @ (torch.nn.functional.silu(gates[i] @ t) * (ups[i] @ t))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def test_entry_points_exist_and_import_neither_vllm_nor_torch() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {
        "vllm.general_plugins": {"dbrx": "dbrx_cli.vllm_plugin:register"},
        "llm": {"dbrx": "dbrx_cli.llm_plugin"},
    }
    code = "import dbrx_cli, dbrx_cli.vllm_plugin as v; v.register; import dbrx_cli.vllm_plugin.launch"
    assert not {"vllm", "transformers", "torch", "llm"} & loaded_by(code)
