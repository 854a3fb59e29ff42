"""`dbrx serve` over real sockets: each reply is what the engine gives alone, in the form that clients rely on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dbrx_cli.engine import Constraint, Done, Request
from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.server import worker
from model import DbrxForCausalLM, SamplingParams
from model.messages import Message
from model.tokenizer import Tokenizer
from tests.conftest import TINY
from tests.served import Served, until
from tests.test_timelines import MARKS

# Letters only: a random network writes what is no text.
TEXT = {str(i): -100 for i in (*range(48), *range(123, 320))}
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def engine_of(folder: Path) -> LocalEngine:
    network = DbrxForCausalLM.from_pretrained(folder, quantize="none")
    return LocalEngine(network, Tokenizer.from_folder(folder), name="small")


@pytest.fixture(scope="module")
def alone(small_checkpoint: Path) -> LocalEngine:
    """What answers one at a time, in this thread."""
    return engine_of(small_checkpoint)


@pytest.fixture(scope="module")
def served(small_checkpoint: Path) -> Iterator[Served]:
    with Served(lambda: engine_of(small_checkpoint)) as running:
        yield running


def reply(engine: LocalEngine, prompt: Any, params: SamplingParams = GREEDY, **options: Any) -> Done:
    messages = [Message("user", prompt)] if options.pop("chat", True) else prompt
    *_, done = engine.stream(Request(messages, params, **options))
    assert isinstance(done, Done)
    return done


def settings(**more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": 12} | more


def user(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def choice(told: dict[str, Any]) -> dict[str, Any]:
    (only,) = told["choices"]
    assert isinstance(only, dict)
    return only


def test_the_form_of_a_reply(served: Served, alone: LocalEngine) -> None:
    told, wanted = served.chat("Hello"), reply(alone, "Hello")
    assert told.pop("id").startswith("chatcmpl-") and isinstance(told.pop("created"), int)
    message = {"role": "assistant", "content": wanted.text, "refusal": None}
    prompt = wanted.usage.prompt_tokens
    told["usage"].pop("prompt_tokens_details")
    assert told == {
        "object": "chat.completion", "model": "small", "system_fingerprint": None,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12},
    }  # fmt: skip


def test_the_form_of_a_stream(served: Served, alone: LocalEngine) -> None:
    options = settings(stream_options={"include_usage": True})
    *events, last = served.stream("chat/completions", messages=user("Hello"), **options)
    assert last == "[DONE]"
    chunks = [event for event in events if isinstance(event, dict)]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    *chunks, total = chunks
    assert total["choices"] == [] and total["usage"]["completion_tokens"] == 12
    first, *middle, end = [choice(chunk) for chunk in chunks]
    assert first == {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    assert (end["delta"], end["finish_reason"]) == ({}, "length")
    assert all(each["finish_reason"] is None for each in middle)
    assert "".join(each["delta"]["content"] for each in middle) == reply(alone, "Hello").text


def test_many_at_once_are_answered_as_each_alone(served: Served, alone: LocalEngine) -> None:
    prompts = [f"{'word ' * (7 * i % 40)}number {i}" for i in range(12)]

    def ask(i: int) -> str:
        if i % 2:
            return str(choice(served.chat(prompts[i], max_tokens=3 + i % 4))["message"]["content"])
        stream = served.stream("completions", prompt=prompts[i], **settings(max_tokens=3 + i % 4))
        return "".join(choice(event)["text"] for event in stream if isinstance(event, dict))

    with ThreadPoolExecutor(len(prompts)) as clients:
        told = list(clients.map(ask, range(len(prompts))))
    for i, text in enumerate(told):
        assert text == reply(alone, prompts[i], replace(GREEDY, max_tokens=3 + i % 4), chat=i % 2).text


def test_a_text_goes_on_from_text_texts_or_ids(served: Served, alone: LocalEngine) -> None:
    wanted = [reply(alone, prompt, chat=False).text for prompt in ("Hello", "Good day")]
    told = served.post("completions", prompt=["Hello", "Good day"], **settings()).json()
    assert [each["text"] for each in told["choices"]] == wanted and told["usage"]["prompt_tokens"] == 13
    ids = alone.tokenizer.encode("Hello")
    told = served.post("completions", prompt=ids, return_token_ids=True, **settings()).json()
    assert choice(told)["text"] == wanted[0] and told["prompt_token_ids"] == ids
    assert choice(told)["token_ids"] == reply(alone, "Hello", chat=False).token_ids


def test_a_stop_string_ends_a_reply_and_is_named(served: Served, alone: LocalEngine) -> None:
    whole = reply(alone, "Hello").text
    stop = whole[3]
    for body in ({"stop": stop}, {"stop": ["never seen", stop]}):
        told = choice(served.chat("Hello", **body))
        assert told["message"]["content"] == whole[: whole.index(stop)]
        assert (told["finish_reason"], told["stop_reason"]) == ("stop", stop)
        end = list(served.stream("chat/completions", messages=user("Hello"), **settings(**body)))[-2]
        assert isinstance(end, dict) and choice(end)["finish_reason"] == "stop" and choice(end)["stop_reason"] == stop


def test_log_probabilities_with_bytes(served: Served, alone: LocalEngine) -> None:
    wanted = reply(alone, "Hello", logprobs=2).logprobs
    assert wanted is not None
    told = choice(served.chat("Hello", logprobs=True, top_logprobs=2))["logprobs"]["content"]
    streamed = served.stream("chat/completions", messages=user("Hello"), **settings(logprobs=True, top_logprobs=2))
    parts = [choice(event).get("logprobs") for event in streamed if isinstance(event, dict)]
    assert [each for part in parts if part for each in part["content"]] == told
    for one, sought in zip(told, wanted, strict=True):
        assert one["token"] == sought.text and one["logprob"] == pytest.approx(sought.logprob, abs=1e-4)
        assert bytes(one["bytes"]).decode("utf-8", "replace") == one["token"] and len(one["top_logprobs"]) == 2
    columns = choice(served.post("completions", prompt="Hello", logprobs=1, **settings()).json())["logprobs"]
    assert len(columns["tokens"]) == len(columns["token_logprobs"]) == len(columns["text_offset"]) == 12


def test_a_bias_decides(served: Served) -> None:
    told = choice(served.chat("Hello", logit_bias={"65": 100, "66": -100}, frequency_penalty=None))
    assert told["message"]["content"] == "A" * 12


def test_choices_have_seeds_of_their_own(served: Served, alone: LocalEngine) -> None:
    warm = settings(temperature=1, top_p=1, seed=5, max_tokens=6)
    told = served.chat("Hello", n=3, **warm)
    params = SamplingParams(temperature=1, top_p=1, max_tokens=6)
    wanted = [reply(alone, "Hello", replace(params, seed=5 + i)).text for i in range(3)]
    assert [each["message"]["content"] for each in told["choices"]] == wanted and len(set(wanted)) == 3
    assert told["usage"]["completion_tokens"] == 18 and told["usage"]["prompt_tokens"] == 24
    texts = ["", "", ""]
    for event in served.stream("chat/completions", messages=user("Hello"), n=3, **warm):
        for each in event["choices"] if isinstance(event, dict) else ():
            texts[each["index"]] += each["delta"].get("content", "")
    assert texts == wanted


SCHEMA = {
    "type": "object", "properties": {"name": {"enum": ["Ada", "Bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"], "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}, SCHEMA),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "text"}, None),
    ],
)
def test_a_schema_is_kept(served: Served, alone: LocalEngine, form: Any, schema: Any) -> None:
    tokens = 40 if schema is SCHEMA else 12
    told = choice(served.chat("Hello", response_format=form, max_tokens=tokens))
    wanted = reply(alone, "Hello", replace(GREEDY, max_tokens=tokens), constraint=schema and Constraint(schema))
    assert told["message"]["content"] == wanted.text
    if schema is SCHEMA:
        jsonschema.validate(json.loads(wanted.text), SCHEMA)
        assert told["finish_reason"] == "stop"


def test_a_reply_goes_on(served: Served, alone: LocalEngine) -> None:
    begun = [*user("Hello"), {"role": "assistant", "content": "Well, "}]
    told = served.post("chat/completions", messages=begun, continue_final_message=True, **settings()).json()
    messages = [Message("user", "Hello"), Message("assistant", "Well, ")]
    assert choice(told)["message"]["content"] == reply(alone, messages, chat=False, continue_final=True).text


def test_a_reply_goes_on_from_the_ids_that_were_sampled(served: Served) -> None:
    def ask(tokens: int, *begun: dict[str, Any]) -> dict[str, Any]:
        options = settings(max_tokens=tokens, continue_final_message=bool(begun))
        messages = [*user("Well?"), *begun]
        told = served.post("chat/completions", messages=messages, logit_bias=TEXT, return_token_ids=True, **options)
        return choice(told.json())

    whole, first = ask(9), ask(3)
    second = ask(3, first["message"])
    third = ask(3, {"role": "assistant", "content": first["message"]["content"] + second["message"]["content"]})
    assert first["token_ids"] + second["token_ids"] + third["token_ids"] == whole["token_ids"]


def test_parts_roles_and_null(served: Served, alone: LocalEngine) -> None:
    messages = [
        {"role": "developer", "content": "Be brief.", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    ignored = {"user": "x", "metadata": {}, "store": False, "service_tier": "auto", "reasoning_effort": "low"}
    absent = dict.fromkeys(("stop", "seed", "n", "tools", "response_format", "logit_bias", "top_p", "stream"))
    told = served.post("chat/completions", messages=messages, tool_choice="none", **settings(), **ignored, **absent)
    wanted = reply(alone, [Message("system", "Be brief."), Message("user", "Hello")], chat=False)
    assert choice(told.json())["message"]["content"] == wanted.text


def test_names_paths_and_slashes(served: Served) -> None:
    listed = served.client.get("models").json()
    (entry,) = listed["data"]
    assert (entry["id"], entry["owned_by"], entry["max_model_len"]) == ("small", "dbrx", TINY["max_seq_len"])
    for path in ("models/", "models/small", "models/other-name/", "../models", "../models/", "../health", "health/"):
        assert served.client.get(path).status_code == 200, path
    for path in ("chat/completions/", "../chat/completions"):
        assert served.post(path, messages=user("Hi"), model="other-name", **settings()).json()["model"] == "small"
    found = served.client.get("metrics").text
    assert "dbrx_completion_tokens_total" in found and "dbrx_rows_running 0.0" in found


FAULTS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"messages": []}, 400, "messages"),
    ({"messages": None}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
     400, "messages[0].content[0].type"),
    ({"model": "gpt-4o"}, 404, "model"),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": "warm"}, 400, "temperature"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"n": 2.5}, 400, "n"),
    ({"stop": [""]}, 400, "stop[0]"),
    ({"logit_bias": {"one": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"320": 1}}, 400, "logit_bias"),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, 400, "messages"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"continue_final_message": True}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param"), FAULTS, ids=lambda value: str(value)[:40])
def test_a_fault_names_its_field(served: Served, body: dict[str, Any], status: int, param: str | None) -> None:
    stream = len(str(body)) % 2 == 0  # it is told before any event
    answer = served.post("chat/completions", **({"messages": user("Hello"), "stream": stream} | body))
    told = answer.json()["error"]
    assert (answer.status_code, told["param"]) == (status, param), told
    assert told["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    long = len(str(body)) > 5000
    assert told["code"] == ("context_length_exceeded" if long else "model_not_found" if status == 404 else None)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b"[" * 5000, b'{"a": NaN}']
)
def test_what_is_no_request_is_refused(served: Served, content: bytes) -> None:
    answer = served.client.post("completions", content=content)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [{"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"prompt": ["a", 1]}])
def test_what_completions_cannot_do_is_refused(served: Served, body: dict[str, Any]) -> None:
    answer = served.post("completions", **({"prompt": "Hello"} | body))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(body))


def test_the_document_fits_what_is_answered(served: Served) -> None:
    document = served.client.get("../openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    asked = chat["requestBody"]["content"]["application/json"]["schema"]
    told = chat["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator.check_schema(asked)
    fits = jsonschema.Draft202012Validator(asked).is_valid
    assert fits({"messages": user("x"), "stop": None, "temperature": 0.5})
    jsonschema.Draft202012Validator(told).validate(served.chat("Hello"))
    assert not any(fits({"messages": user("x")} | body) for body, *_ in FAULTS[5:12])
    assert served.client.delete("models").headers["allow"] in ("GET, HEAD", "HEAD, GET")


def test_a_conversation_goes_on_from_the_ids_that_were_sampled(
    served: Served, alone: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "AHEAD_SECONDS", 60)
    talk = user("Hello")
    known: list[int] = []
    for _ in range(4):
        told = served.post("chat/completions", messages=talk, logit_bias=TEXT, return_token_ids=True, **settings())
        ids = told.json()["prompt_token_ids"]
        assert ids[: len(known)] == known
        read = told.json()["usage"]
        unread = read["prompt_tokens"] - read["prompt_tokens_details"]["cached_tokens"]
        assert not known or unread == len(ids) - len(known) + 1, "what is new, and the last id: it was never read"
        known = ids + choice(told.json())["token_ids"]
        talk += [choice(told.json())["message"], *user("And then?")]
    monkeypatch.setattr(worker, "AHEAD_SECONDS", 0)
    served.chat("Hello")  # and then nobody asks
    until(lambda: not served.service.worker._ended)
    read = served.post("chat/completions", messages=talk, logit_bias=TEXT, **settings()).json()["usage"]
    marks = alone.tokenizer.encode_segments(MARKS)
    assert read["prompt_tokens_details"]["cached_tokens"] == len(known) + len(marks), "they were read meanwhile"
