"""`dbrx serve` with programs of others: `make test-clients`, which pins them in an environment of its own.

CLIENTS_PYTHON: the interpreter of an environment with openai 3.57.0, litellm 1.108.7, langchain-openai 1.7.4, llm 0.36.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.server.service import Limits
from model.messages import Message
from tests.clients import ASKED, BIAS, CLIENTS, SCHEMA, STOP
from tests.served import Served
from tests.test_server import GREEDY, engine_of, reply
from tests.test_server_life import until

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
PYTHON = os.environ.get("CLIENTS_PYTHON", "python")


@pytest.fixture(scope="module")
def alone(small_checkpoint: Path) -> LocalEngine:
    return engine_of(small_checkpoint)


@pytest.fixture(scope="module")
def served(small_checkpoint: Path) -> Iterator[Served]:
    with Served(lambda: engine_of(small_checkpoint), Limits(rows=2)) as running:
        yield running


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_of_others(client: str, served: Served, alone: LocalEngine) -> None:
    script = Path(__file__).with_name("clients.py")
    done = subprocess.run([PYTHON, script, client, served.url], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    bias = {int(token): value for token, value in BIAS.items()}
    talk: list[Message] = []
    for asked, content in zip(ASKED, told["turns"], strict=True):
        talk.append(Message("user", asked))
        assert content == reply(alone, talk, chat=False, logit_bias=bias).text
        talk.append(Message("assistant", content))
    jsonschema.validate(json.loads(told["schema"]), SCHEMA)
    assert told["stopped"] == [reply(alone, "Hello", GREEDY, stop=tuple(STOP), logit_bias=bias).text, "stop"]
    assert told["fault"] == "context_length_exceeded"
    until(lambda: not served.service.open and not served.service.worker.running)
