"""`--url` against real servers, held against the openai package.

SERVERS: addresses of running servers (docs/servers.md has those that were tried), with spaces between them.
OPENAI_PYTHON: the interpreter of an environment that has openai.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from dbrx_cli.engine import Constraint, Done, Request
from dbrx_cli.engine.at_once import at_once
from dbrx_cli.engine.fitting import misfit
from dbrx_cli.engine.remote import RemoteEngine
from dbrx_cli.options import EngineOptions, OutputOptions
from dbrx_cli.report import Report
from model.messages import Message
from tests.test_remote import ask

pytestmark = [
    pytest.mark.reference,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("url", os.environ.get("SERVERS", "").split() or [pytest.param("", marks=pytest.mark.skip)]),
]
ENVIRONMENT = os.environ.get("OPENAI_PYTHON", "python")
OPENAI = """
import json, sys, openai
url, content = json.loads(sys.stdin.read())
reply = openai.OpenAI(base_url=url, api_key="none").chat.completions.create(**content)
print(json.dumps([reply.choices[0].message.content, reply.choices[0].finish_reason, reply.usage.prompt_tokens]))
"""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def opened(url: str) -> RemoteEngine:
    return RemoteEngine.open(EngineOptions(url=url), Report(OutputOptions(quiet=True)))


def params(remote: RemoteEngine, **given: Any) -> Any:
    return replace(remote.defaults, temperature=0, **given)


@pytest.mark.parametrize("question", ["Say hi.", "Was ist 2+2? Antworte auf Deutsch. Größe: 😀"])
def test_the_reply_is_what_openai_gets(url: str, question: str) -> None:
    remote = opened(url)
    messages = [Message("system", "Be brief."), Message("user", question)]
    done = ask(remote, messages, params=params(remote, max_tokens=12))
    content = {"model": remote.name, "messages": [vars(m) for m in messages], "max_tokens": 12, "temperature": 0}
    asked = json.dumps([remote.server.bases[0], content])
    told = subprocess.run([ENVIRONMENT, "-c", OPENAI], input=asked, capture_output=True, text=True, check=True).stdout
    text, reason, tokens = json.loads(told)
    assert (done.text, done.finish_reason, done.usage.prompt_tokens) == (text, reason, tokens)


def test_a_schema_is_kept_or_its_misfit_told(url: str) -> None:
    remote = opened(url)
    given = params(remote, max_tokens=60)
    done = ask(remote, [Message("user", "Invent a person.")], params=given, constraint=Constraint(SCHEMA))
    ended = done.finish_reason == "stop"
    assert (done.error is None) == (misfit(SCHEMA, done.text, ended) is None)


def test_log_probabilities_are_there_or_missed(url: str) -> None:
    remote = opened(url)
    done = ask(remote, params=params(remote, max_tokens=3), logprobs=2)
    if done.logprobs is None:
        assert "tells no log-probabilities" in str(done.error)
    else:
        assert done.usage.completion_tokens == len(done.logprobs) and all(len(one.top) == 2 for one in done.logprobs)


def test_a_reply_goes_on_where_it_stopped(url: str) -> None:
    remote = opened(url)
    if not remote.continues:
        pytest.skip("refused by name")
    whole = ask(remote, params=params(remote, max_tokens=12)).text
    first = ask(remote, params=params(remote, max_tokens=6)).text
    messages = [Message("user", "Hi"), Message("assistant", first)]
    *_, done = remote.stream(Request(messages, params(remote, max_tokens=6), continue_final=True))
    assert isinstance(done, Done) and done.text == whole


def test_many_at_once_are_what_they_are_alone(url: str) -> None:
    remote = opened(url)
    asked = [Request([Message("user", f"Count from {i}.")], params(remote, max_tokens=5)) for i in range(3)]
    found = dict(at_once(remote, enumerate(asked), 3))
    for number, request in enumerate(asked):
        *_, alone = remote.stream(request)
        together = found[number]
        assert isinstance(alone, Done) and isinstance(together, Done) and together.text == alone.text
