"""DBRX in `llm`, by llm's own runner: `make test-llm`, or LLM_PYTHON names the interpreter of its environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from model import AutoTokenizer, DbrxForCausalLM
from tests.cli import environment
from tests.stub_server import TEXT, Server

PYTHON = os.environ.get("LLM_PYTHON", "")
QUESTION = "What is the capital of France?"
pytestmark = [
    pytest.mark.llm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="LLM_PYTHON names no interpreter of an environment with llm"),
]
# llm's command line in one process, by click's runner: [[arguments, stdin], ...] in, [[exit code, output], ...] out.
# The output is stdout's; of a fault, all of it.
RUNNER = """
import json, sys
from click.testing import CliRunner
from llm.cli import cli
told = []
for arguments, given in json.load(sys.stdin):
    result = CliRunner().invoke(cli, arguments, input=given, catch_exceptions=False)
    told.append([result.exit_code, result.output if result.exit_code else result.stdout])
print(json.dumps(told))
"""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 99}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


def llm(folder: Path, *runs: tuple[list[str], str | None], **variables: str) -> list[tuple[int, str]]:
    done = subprocess.run(
        [PYTHON, "-c", RUNNER], input=json.dumps(runs), capture_output=True, text=True,
        env=environment(LLM_USER_PATH=str(folder), **variables),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(code, output) for code, output in json.loads(done.stdout.splitlines()[-1])]


def own_reply(folder: Path, messages: list[dict[str, str]], tokens: int) -> str:
    tokenizer, network = AutoTokenizer.from_pretrained(folder), DbrxForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    reply = network.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(reply, skip_special_tokens=True)


def test_in_process(tmp_path: Path, demo_checkpoint: Path) -> None:
    greedy = ["-m", "dbrx/demo", "-o", "temperature", "0", "-o", "max_tokens", "24"]
    schema = ["--schema", json.dumps(SCHEMA)]
    listed, options, asked, chat, fitting, logged, wrong = llm(
        tmp_path,
        (["models", "list"], None),
        (["models", "list", "--options", "-q", "dbrx/demo"], None),
        (["prompt", *greedy, "-s", "Be brief.", QUESTION], None),
        (["chat", *greedy], f"{QUESTION}\nAnd of Italy?\nquit\n"),
        (["prompt", *greedy[:4], "0", *schema, "Invent a city."], None),
        (["logs", "list", "--json", "-n", "0"], None),
        (["prompt", *greedy, "-o", "top_p", "2", QUESTION], None),
    )
    assert "dbrx/demo" in listed[1] and "dbrx/server" not in listed[1]
    assert "temperature" in options[1] and "quantize" in options[1] and "0 always takes the likeliest." in options[1]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert asked == (0, own_reply(demo_checkpoint, messages, 24) + "\n")
    first = own_reply(demo_checkpoint, messages[1:], 24)
    turns = [*messages[1:], {"role": "assistant", "content": first}, {"role": "user", "content": "And of Italy?"}]
    assert first in chat[1] and own_reply(demo_checkpoint, turns, 24) in chat[1]
    value = json.loads(fitting[1])
    assert value.keys() == {"city", "people"} and len(value["city"]) <= 12 and value["people"] <= 99
    rows: list[dict[str, Any]] = json.loads(logged[1])
    assert [row["model"] for row in rows] == ["dbrx/demo"] * 4
    assert rows[0]["response"] == asked[1].strip() and rows[0]["input_tokens"] > 0 and rows[0]["output_tokens"] > 0
    assert rows[1]["conversation_id"] == rows[2]["conversation_id"]
    assert wrong[0] == 1 and "top_p must be" in wrong[1]


def test_through_a_server(tmp_path: Path, server: Server) -> None:
    variables = {"DBRX_URL": server.url}
    listed, asked, logged = llm(
        tmp_path,
        (["models", "list"], None),
        (["prompt", "-m", "dbrx/server", "-o", "temperature", "0", QUESTION], None),
        (["logs", "list", "--json"], None),
        **variables,
    )
    assert "dbrx/server" in listed[1]
    assert asked == (0, TEXT + "\n")
    content = server.seen[-1][2]
    assert content["temperature"] == 0 and content["messages"] == [{"role": "user", "content": QUESTION}]
    assert json.loads(logged[1])[0]["response"] == TEXT


def test_a_server_that_is_gone_is_one_line(tmp_path: Path) -> None:
    ((code, output),) = llm(tmp_path, (["-m", "dbrx/server", QUESTION], None), DBRX_URL="http://127.0.0.1:9")
    assert code == 1 and len(output.strip().splitlines()) == 1 and "127.0.0.1:9" in output
