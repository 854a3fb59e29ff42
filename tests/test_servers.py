"""`--url` against what servers of many makers answer: addresses, lists, contexts, forms of replies, batches."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dbrx_cli.engine import Constraint, Delta, Done, Request, http_client
from dbrx_cli.engine.at_once import at_once as answers
from dbrx_cli.engine.fitting import Undecided, misfit
from dbrx_cli.engine.remote import RemoteEngine, ServerParams
from dbrx_cli.options import UNHEARD, EngineOptions, OutputOptions
from dbrx_cli.report import Report
from model.errors import AccessError, ConnectionFault, DbrxError, ModelError
from model.hub import retry
from model.hub.retry import FEW_TRIES
from model.messages import Message
from tests.cli import SOON, Cli
from tests.stub_server import TEXT, Handler, Send, Server, after_pieces, choice, chunks, status, whole
from tests.test_remote import ask, engine

TLS = Path(__file__).parent / "data" / "tls"
HI = [Message("user", "Hi")]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip


def asked(server: Server) -> dict[str, Any]:
    """What the last request held."""
    return server.seen[-1][2]


# --- addresses and lists --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "address"),
    [
        ("/serving-endpoints", "/serving-endpoints"),  # Databricks
        ("/v1beta/openai", "/v1beta/openai/"),  # Google
        ("/api/paas/v4", "/api/paas/v4"),
        ("/api/v1", "/api/v1"),  # OpenRouter
        ("/openai/v1", "/openai/v1"),  # Azure
        ("/openai/v1", "/openai"),  # Groq
        ("/proxy/v1", "/proxy/v1/chat/completions"),
        ("/api/v3", "/api/v3/models"),
        ("", "/"),  # Perplexity
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_addresses(server: Server, root: str, address: str, listed: bool) -> None:
    server.root, server.list_status = root, 200 if listed else 404
    options = EngineOptions(url=server.url + address, model="dbrx-b")
    assert ask(RemoteEngine.open(options, Report(OutputOptions()))).text == TEXT
    assert server.seen[-1][0] == f"{root}/chat/completions"


PASSING = (408, 425, 429, 500, 502, 503, 504, 520, 529)


@pytest.mark.slow
@pytest.mark.parametrize("code", PASSING)
@pytest.mark.parametrize("at", ["list", "reply"])
def test_one_passing_error_ends_no_command(server: Server, cli: Cli, code: int, at: str) -> None:
    """Each is told, and asked again."""
    faults = [code]
    if at == "list":
        server.list_statuses = faults
    server.reply = lambda handler: (status(faults.pop(), {"error": "wait"}) if faults else whole)(handler)
    for model in ([], ["-m", "dbrx-b"]):
        faults[:] = [code]
        ran = cli("generate", "--no-log", "--url", server.url, *model, "hi")
        assert (ran.code, ran.out) == (0, TEXT + "\n"), ran.err
        assert f"answered {code} (wait): it is asked again" in ran.err and not faults


@pytest.mark.parametrize(("code", "tries"), [(500, FEW_TRIES), (503, 8)])
def test_an_error_that_stays_ends_in_one_line(
    server: Server, cli: Cli, code: int, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.06)
    server.reply = status(code, {"error": "wait"})
    ran = cli("generate", "--no-log", "-m", "dbrx-a", "--url", server.url, "hi")
    notice, fault = ran.err.splitlines()
    assert ran.code == 7 and "asked again" in notice and fault.startswith("dbrx: 127.0.0.1")
    assert 1 < sum(path.endswith("completions") for path, *_ in server.seen) <= max(tries, 12)


def test_a_pause_that_is_too_long_is_told_at_once(server: Server, cli: Cli) -> None:
    server.reply = status(429, {"error": "slow"}, retry_after="3600")
    fault = cli("generate", "--no-log", "-m", "dbrx-a", "--url", server.url, "hi").fault
    assert "answered 429 (slow) and asks to wait 3600 seconds" in fault


def test_a_head_that_drips_ends_soon(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though silence before it may last: a long prompt takes minutes to be read."""
    monkeypatch.setattr(http_client, "FIRST_SECONDS", 60.0)
    monkeypatch.setattr(http_client, "HEAD_SECONDS", 0.3)
    assert http_client.HEAD_SECONDS + http_client.POLL_SECONDS < 30

    def drip(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-long: ")
        while True:
            handler.wfile.write(b"a")
            time.sleep(0.05)

    server.reply = drip
    with pytest.raises(DbrxError, match="the head of its answer too slowly"):
        ask(engine(server))
    server.reply = lambda handler: (time.sleep(0.6), whole(handler))[1]  # a head that is late
    assert ask(engine(server)).text == TEXT


@pytest.mark.parametrize(("code", "exit_code"), [(404, 7), (405, 7), (501, 7), (403, 4), (400, 1), (500, 7), (302, 7)])
def test_a_server_without_a_list(server: Server, code: int, exit_code: int) -> None:
    server.list_status, server.models = code, {"error": {"message": "no such path"}}
    assert ask(engine(server, model="dbrx")).text == TEXT
    with pytest.raises(DbrxError) as fault:
        engine(server)
    assert fault.value.exit_code == exit_code and "name one with -m" in fault.value.one_line


@pytest.mark.parametrize(
    "models",
    [
        {"object": "list", "data": [{"id": "x"}]},
        [{"id": "x"}],  # Together
        ["x"],
        {"models": [{"name": "x"}]},  # Cohere
        {"data": [{"id": "x"}, {"id": 3}, "y", None]},
    ],
)
def test_forms_of_lists(server: Server, models: Any) -> None:
    server.models = models
    assert engine(server).name == "x"


@pytest.mark.parametrize("models", [[], {"data": []}, {"data": None}, {"data": [{"id": "openai/*"}]}])
def test_a_list_without_a_name(server: Server, models: Any) -> None:
    server.models = models
    with pytest.raises(ModelError, match="names no model"):
        engine(server)
    assert engine(server, model="x").name == "x"


def test_names_that_are_not_listed(server: Server, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    server.models = {
        "data": [{"id": "dbrx:latest", "max_model_len": 99}, {"id": "m", "aliases": ["small"]}, {"id": "openai/*"}]
    }
    for name in ("dbrx", "dbrx:latest", "small", "openai/gpt", "m:latest"):  # ollama, llama-server, LiteLLM
        assert ask(RemoteEngine.open(EngineOptions(url=server.url, model=name), Report(OutputOptions()))).text == TEXT
        assert asked(server)["model"] == name and capsys.readouterr().err == ""
    assert engine(server, model="dbrx").context == 99
    result = cli("generate", "--no-log", "-m", "other", "--url", server.url, "hi")
    assert result.code == 0 and "does not list other" in result.err and "dbrx:latest, m, openai/*" in result.err
    for code, said in ((404, "The model `other` does not exist"), (400, "Invalid model name passed in model=other"),
                       (400, "Server is pinned to 'm'; requested 'other'."), (404, "not known here")):  # fmt: skip
        server.reply = status(code, {"error": said})
        with pytest.raises(ModelError) as fault:
            ask(engine(server, model="other"))
        assert said in fault.value.one_line and "it lists dbrx:latest, m, openai/*" in fault.value.one_line


@pytest.mark.parametrize(
    ("entry", "context"),
    [
        ({"meta": {"n_ctx": 512, "n_ctx_train": 8192}}, 512),  # llama-server
        ({"max_model_len": 600}, 600),  # vLLM, SGLang
        ({"context_length": 131072, "top_provider": {"context_length": 32000}}, 32000),  # OpenRouter
        ({"max_input_tokens": 400}, 400),  # LiteLLM
        ({"context_window": 8192}, 8192),  # Groq
        ({"max_context_length": 32768, "loaded_context_length": 4096}, 4096),  # LM Studio
        ({"limits": {"max_input_tokens": 7000}}, 7000),  # GitHub
        ({"meta": {"n_ctx_train": 8192}}, 32768),
        ({"max_model_len": True, "n_ctx": -1, "context_length": "8", "context_window": 10**400}, 32768),
    ],
)
def test_where_servers_tell_the_context(server: Server, entry: dict[str, Any], context: int) -> None:
    server.models = {"data": [{"id": "x", **entry}]}
    assert engine(server).context == context and engine(server, model="unlisted").context == context
    assert engine(server, context=100).context == 100 and engine(server, context=5000).context == min(context, 5000)


def test_no_more_is_asked_for_than_the_context_holds(server: Server, cli: Cli) -> None:
    server.models = {"data": [{"id": "x", "max_model_len": 600}]}
    remote = engine(server)
    for wanted, sent in ((1024, range(560, 600)), (5000, range(560, 600)), (7, [7])):
        ask(remote, params=replace(remote.defaults, max_tokens=wanted))
        assert asked(server)["max_tokens"] in sent
    result = cli("generate", "--no-log", "--url", server.url, "--context", "50", "word " * 300)
    assert result.code == 6 and "--context is 50" in result.fault


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_only_what_was_given_is_sent(server: Server, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("generate", "-q", "--no-log", "--url", server.url)
    usual = {"model", "messages", "stream", "stream_options", "max_tokens"}
    cli(*run, "hi")
    assert set(asked(server)) == usual
    cli(*run, "--temperature", "0.7", "--seed", "0", "hi")  # defaults of models here, but given
    assert set(asked(server)) == {*usual, "temperature", "seed"} and asked(server)["seed"] == 0
    monkeypatch.setenv("DBRX_TOP_P", "0.5")
    cli(*run, "hi")
    assert set(asked(server)) == {*usual, "top_p"}
    assert json.loads(cli(*run, "--json", "hi").out)["seed"] is None
    result = cli(*run, "--seed", str(2**31), "hi")
    assert result.code == 2 and "seed must be from 0 to 2147483647" in result.fault
    for seed in (-1, 2**32 - 1, 2**64 - 1):
        with pytest.raises(ValueError, match="seed must be"):
            ServerParams(seed=seed)


@pytest.mark.parametrize(
    ("owner", "keys"),
    [
        ("llamacpp", {"repeat_penalty"}),
        ("vllm", {"repetition_penalty"}),
        ("me", {"repeat_penalty", "repetition_penalty"}),
    ],
)
def test_the_key_of_the_repetition_penalty(server: Server, owner: str, keys: set[str]) -> None:
    server.models = {"data": [{"id": "x", "owned_by": owner}]}
    remote = engine(server)
    ask(remote, params=replace(remote.defaults, repetition_penalty=1.5))
    assert {key: value for key, value in asked(server).items() if "penalty" in key} == dict.fromkeys(keys, 1.5)


def refuse(*names: str, code: int = 422, said: str | None = None, then: Send = whole) -> Send:
    """Refuses requests that hold any of these fields, in FastAPI's words."""

    def reply(handler: Handler) -> None:
        found = [name for name in names if name in handler.asked]
        faults = [{"loc": ["body", name], "msg": "extra input"} for name in found]
        if found:
            handler.answer(code, {"detail": said or faults})
        else:
            then(handler)

    return reply


def test_what_is_left_out_when_a_server_refuses_it(server: Server) -> None:
    for code, said in (
        (422, None),
        (400, "bad request"),
        (400, "stream_options is not supported"),
        (400, "stream_options is not allowed in this context"),
    ):
        server.reply = refuse("stream_options", code=code, said=said)
        remote = engine(server)
        assert ask(remote).text == TEXT
        before = len(server.seen)
        assert ask(remote).text == TEXT and len(server.seen) == before + 1  # it has learnt
    server.reply = refuse(
        "max_tokens", said="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    )
    assert ask(engine(server)).text == TEXT and asked(server)["max_completion_tokens"] == 1024


@pytest.mark.parametrize(
    ("given", "field", "flag"),
    [({"temperature": 1}, "temperature", "--temperature"), ({"min_p": 0.1}, "min_p", "--min-p"),
     ({"repetition_penalty": 2}, "repeat_penalty", "--repetition-penalty"), ({"seed": 1}, "seed", "--seed"),
     ({"stop": ("x",)}, "stop", "--stop"), ({"logprobs": 1}, "top_logprobs", "--logprobs"),
     ({"constraint": Constraint(SCHEMA)}, "response_format", "--schema")],
)  # fmt: skip
def test_a_refused_option_is_named(server: Server, given: dict[str, Any], field: str, flag: str) -> None:
    server.reply = refuse(field)
    remote = engine(server)
    params = {name: given.pop(name) for name in list(given) if hasattr(remote.defaults, name)}
    with pytest.raises(DbrxError) as fault:
        ask(remote, params=replace(remote.defaults, **params), **given)
    assert fault.value.exit_code == 1 and f"body.{field}: extra input" in fault.value.message
    assert fault.value.hint == f"leave out {flag}, or choose another value"


def test_flags_that_no_server_hears_of(server: Server, cli: Cli) -> None:
    for flags in (("--adapter", "no/such"), ("--compile",), ("--lookup", "4"), ("--resume", "x")):
        result = cli("generate", "--no-log", "--url", server.url, *flags, "hi")
        assert result.code == 2 and f"{flags[0]} has no effect with --url" in result.fault and not server.seen
    assert UNHEARD >= {"revision", "attn", "dtype", "quantize", "device_map", "max_memory", "offload", "expert_cache"}
    assert UNHEARD >= {"threads", "prompt_cache"} and not UNHEARD & {"model", "context", "url", "seed", "max_tokens"}


def test_settings_for_models_here_do_not_hinder(server: Server, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBRX_QUANTIZE", "int8")
    monkeypatch.setenv("DBRX_URL", server.url)
    assert cli("generate", "-q", "--no-log", "hi").out == TEXT + "\n"
    result = cli("generate", "--no-log", "--threads", "2", "hi")
    assert result.code == 2 and "--threads has no effect with --url" in result.fault and "DBRX_URL" in result.fault


# --- forms of replies -----------------------------------------------------------------------------------------------

STOP = choice(None, "stop")
ERROR = {"message": "overloaded"}


@pytest.mark.parametrize(
    "reply",
    [
        chunks(choice("Hel", ""), choice("lo", "null"), choice("", "stop")),
        chunks(choice([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]), STOP),
        chunks(choice("Hello"), "[DONE]"),
        chunks(choice("Hello"), STOP),  # no [DONE]: transformers
        chunks(choice("Hello"), choice(None, "STOP")),
        chunks(choice("Hel", "stop"), choice("lo")),  # text behind the end, which clients add up too
        chunks(choice("Hello", "stop"), choice(""), choice(None), {"choices": [], "usage": {"completion_tokens": 1}}),
        status(200, b'event: ping\ndata: at work\n\ndata: {"choices": [{"text": "Hello"}]}\n\ndata: [DONE]\n'),
        chunks({"choices": [{"index": 1, "text": "No", "finish_reason": "length"}]}, choice("Hello"), STOP),
        chunks({"choices": []}, {"choices": None, "usage": None}, choice("Hello"), choice(None, "eos_token")),
        chunks({"message": "", "choices": [{"delta": {"content": "Hello"}, "finish_reason": "stop"}]}),
        status(200, {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}),
        status(200, b'{\n "choices": [{"message": {"content": "Hello"},\n "finish_reason": "stop"}]\n}'),
        status(200, b'data: {"choices": [{"delta": {"content": "Hello"}, "finish_reason": "stop"}]}\n'),
        status(200, b'\xef\xbb\xbfdata: {"choices": [{"delta": {"content": "Hello"}, "finish_reason": "stop"}]}\n'),
        status(200, b'\xef\xbb\xbf{"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}'),
    ],
)  # fmt: skip
def test_forms_of_a_whole_reply(server: Server, reply: Send) -> None:
    server.reply = reply
    done = ask(engine(server))
    assert (done.text, done.finish_reason, done.error) == ("Hello", "stop", None)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (chunks({"error": ERROR}), 7), (chunks({"error": "overloaded"}), 7), (chunks({"object": "error", **ERROR}), 7),
        (chunks(ERROR), 7), (chunks({"detail": [{"loc": ["body"], "msg": "overloaded"}]}), 7),
        (chunks({"error": {**ERROR, "code": 503}}), 7), (chunks({"error": {**ERROR, "code": 401}}), 4),
        (chunks({"error": {"message": "overloaded context window", "code": 400}}), 6),
        (status(200, b'event: error\ndata: {"message": "overloaded"}\n\n'), 7),
        (status(200, b"event: error\ndata: overloaded\n\n"), 7),
        (status(200, b'event: error\ndata: {"error": {"type": "x", "message": "overloaded"}}'), 7),
        (status(400, {"error": "overloaded: this is no context-free grammar"}), 1),
        (status(400, {"error": "overloaded: ContextWindowExceededError"}), 6),
        (status(400, {"error": "overloaded: the request exceeds the available context"}), 6),
        (status(200, {"error": ERROR}), 7), (status(400, [{"error": ERROR}]), 1),
    ],
)  # fmt: skip
def test_errors_in_every_form(server: Server, reply: Send, code: int) -> None:
    server.reply = reply
    with pytest.raises(DbrxError, match="overloaded") as fault:
        ask(engine(server))
    assert fault.value.exit_code == code


def test_a_reply_that_breaks_off_is_kept_as_far_as_it_came(server: Server, cli: Cli) -> None:
    server.reply = after_pieces(lambda handler: handler.event({"error": "out of memory"}))
    run = ("generate", "-q", "--url", server.url)
    answer = json.loads(cli(*run, "--no-log", "--json", "hi").out)
    assert (answer["text"], answer["finish_reason"], answer["error"]["code"]) == (TEXT, "interrupted", 7)
    *_, last = map(json.loads, cli(*run, "--no-log", "--jsonl", "hi").out.splitlines())
    assert last["event"] == "done" and "out of memory" in last["error"]["message"]
    result = cli(*run, "hi")
    assert (result.code, result.out) == (7, TEXT + "\n") and "gave up: out of memory" in result.fault
    assert "sea is blü" in cli("sessions", "show", "1").out
    result = cli("chat", "-q", "--url", server.url, stdin="hi\n")
    assert (result.code, result.out) == (7, TEXT + "\n")
    assert [m["content"] for m in json.loads(cli("sessions", "export", "2", "--json").out)["messages"]] == ["hi", TEXT]


def test_an_empty_reply_is_told(server: Server) -> None:
    thought = {"choices": [{"delta": {"reasoning_content": "Hm."}, "finish_reason": "length"}]}
    for reply, words in ((chunks(STOP), "empty reply (stop)"), (chunks(thought), "though the model has thought")):
        server.reply = reply
        with pytest.raises(DbrxError) as fault:
            ask(engine(server))
        assert fault.value.exit_code == 1 and words in fault.value.message


def test_counts_and_names_that_are_nonsense(server: Server, cli: Cli) -> None:
    usage = {"prompt_tokens": 10**400, "completion_tokens": 10**400}
    server.reply = chunks(choice("Hello", "stop"), {"choices": [], "usage": usage})
    server.models = {"data": [{"id": "\ud800"}, {"id": "x"}]}
    result = cli("generate", "--no-log", "--json", "-v", "--url", server.url, "hi")
    answer = json.loads(result.out)
    assert (result.code, answer["model"], answer["usage"]["completion_tokens"]) == (0, "x", 1)


def test_halves_of_characters(server: Server, cli: Cli) -> None:
    server.reply = chunks(choice("a\ud83d"), choice("\ude00b"), choice("\ud800"), choice("c\udc00\ud801"), STOP)
    assert ask(engine(server)).text == "a😀b\ufffdc\ufffd\ufffd"
    assert cli("generate", "-q", "--no-log", "--url", server.url, "hi").out == "a😀b\ufffdc\ufffd\ufffd\n"


def test_patience_lasts_until_the_first_text(server: Server) -> None:
    def slow(handler: Handler) -> None:
        handler.begin()
        handler.event(choice("", role="assistant"))
        time.sleep(1.6 * http_client.IDLE_SECONDS)  # it reads the prompt
        handler.piece("x", "stop")
        handler.end()

    server.reply = slow
    assert ask(engine(server)).text == "x"


@pytest.mark.parametrize("line", [b": at work\n\n", b'data: {"choices": [{"delta": {"content": ""}}]}\n\n'])
def test_signs_of_life_without_text_do_not_last_for_ever(
    server: Server, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    monkeypatch.setattr(http_client, "FIRST_SECONDS", 0.2)
    monkeypatch.setattr(http_client, "SIGNS", 2)

    def reply(handler: Handler) -> None:
        handler.begin()
        for _ in range(100):
            handler.raw(line)
            time.sleep(0.02)

    server.reply = reply
    began = time.monotonic()
    with pytest.raises(ConnectionFault, match="too long"):
        ask(engine(server))
    assert time.monotonic() - began < SOON


# --- schemas, log-probabilities, going on ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    '{"a": 1}', '{"b": "é\\u00e9", "a": 2}', ' {\n"a":\t3 }\n', "Sure! {}",
    '{"a": "1"}', '{"b": "x"}', '{"a": 1, "c": 2}', "[]", "",
])  # fmt: skip
def test_a_reply_is_held_against_its_schema(server: Server, text: str) -> None:
    server.reply = chunks(choice(text + " "), STOP)
    done = ask(engine(server), constraint=Constraint(SCHEMA))
    assert asked(server)["response_format"]["json_schema"]["schema"] == SCHEMA
    try:
        fits = not list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(json.loads(text)))
    except ValueError:
        fits = False
    assert (done.error is None) == fits and (fits or "does not keep to --schema" in str(done.error))


def members(*names: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {n: {"type": "integer"} for n in names}, "required": [*names], **more}


@pytest.mark.parametrize(("schema", "texts"), [
    ({"oneOf": [members("k", "n", additionalProperties=False), members("z", additionalProperties=False)]},
     ['{"n": 1, "k": 2}', '{"n": 1, "z": 2}']),
    ({"allOf": [members("a"), members("b", "c")]}, ['{"c": 1, "b": 1, "a": 2}', '{"b": 1, "a": 2}']),
    ({"type": "array", "prefixItems": [members("a", "b")]}, ['[{"b": 1, "a": 2}, {}, []]', '[{"b": 1}]']),
    ({"type": "object", "additionalProperties": members("a", "b")}, ['{"x": {"b": 1, "a": 2}}', '{"x": {"a": 1}}']),
    (members("a", patternProperties={"^x": {"type": "integer"}}, additionalProperties=False),
     ['{"x": 1, "a": 2}', '{"x": 1, "y": 3, "a": 2}']),
    ({"$defs": {"x": {"$ref": "#/$defs/y"}, "y": members("a", "b")}, "$ref": "#/$defs/x"},
     ['{"b": 1, "a": 2}', '{"b": 1}']),
    (members(*"abcdef", required=[]), ['{"f": 1, "d": 1.0, "a": 0}', '{"f": 1, "d": 1.5, "a": 0}']),
    ({"type": "integer"}, ["1.0", "-2e2", "1.5"]),
    ({"type": "number", "minimum": 0, "maximum": 200}, ["1e2", "1e-7", "-1e-7", "1e3"]),
    ({"type": "array"}, ["[" * 300 + "]" * 300, json.dumps([*range(2000)])]),
])  # fmt: skip
def test_order_of_keys_and_spelling_of_numbers_are_free(schema: dict[str, Any], texts: list[str]) -> None:
    valid = jsonschema.Draft202012Validator(schema).is_valid
    assert [misfit(schema, text, True) is None for text in texts] == [valid(json.loads(text)) for text in texts]


def test_what_takes_too_long_to_check_is_no_fault(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    schema = members(*"abcdefghijklmnop", required=[])
    text = json.dumps({name: "x" if name == "a" else 1 for name in "ponmlkjihgfedcba"})
    with pytest.raises(Undecided):
        misfit(schema, text, True)
    server.reply = chunks(choice(text), STOP)
    remote = RemoteEngine.open(EngineOptions(url=server.url), Report(OutputOptions()))
    assert ask(remote, constraint=Constraint(schema)).error is None
    assert "could not be checked against --schema" in capsys.readouterr().err


def test_a_reply_that_is_cut_off_must_begin_as_json() -> None:
    assert misfit(SCHEMA, '{"a": ', ended=False) is None
    assert misfit(SCHEMA, "I'm glad", ended=False) == "the reply is not JSON"


def token(text: str, logprob: Any, top: Any = None, **more: Any) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "top_logprobs": top or [], **more}


def test_log_probabilities(server: Server) -> None:
    content = [token("a", -1, [token("b", -3.0), token("a", -1.0)], id=7), token("\ud800", float("-inf"), id=8)]
    server.reply = chunks(choice("ab", logprobs={"content": content}), STOP)
    remote = engine(server)
    first, second, done = remote.stream(Request(HI, remote.defaults, logprobs=2))
    assert asked(server)["logprobs"] is True and asked(server)["top_logprobs"] == 2
    assert isinstance(first, Delta) and isinstance(second, Delta) and isinstance(done, Done) and done.logprobs
    assert (first.text + second.text, first.token_id, done.token_ids) == ("ab", 7, [7, 8])
    assert [(one.text, one.logprob) for one in done.logprobs[0].top] == [("a", -1.0), ("b", -3.0)]
    assert (done.logprobs[1].text, done.logprobs[1].logprob) == ("\ufffd", -9999.0)
    # A plain completion's form.
    top = {"y": -2.0, "z": -1.5, "w": -(10**400)}
    told = {"tokens": ["x", "y"], "token_logprobs": [None, -2.0], "top_logprobs": [None, top]}
    server.reply = chunks({"choices": [{"text": "xy", "logprobs": told, "finish_reason": "stop"}]})
    done = ask(remote, "Once", logprobs=2)
    assert done.logprobs and [(one.text, one.logprob) for one in done.logprobs] == [("y", -2.0)]
    assert [one.text for one in done.logprobs[0].top] == ["z", "y", "w"] and asked(server)["logprobs"] == 2
    server.reply = whole
    done = ask(remote, logprobs=0)
    assert done.text == TEXT and "tells no log-probabilities" in str(done.error)


def test_token_ids_of_vllm(server: Server) -> None:
    server.models = {"data": [{"id": "x", "owned_by": "vllm"}]}
    server.reply = chunks(choice("", token_ids=None), choice("ab", token_ids=[5, 6]), choice("", "stop", token_ids=[2]))
    assert ask(engine(server)).token_ids == [5, 6, 2] and asked(server)["return_token_ids"] is True


@pytest.mark.parametrize(("owner", "sent"), [
    ("vllm", {"continue_final_message": True, "add_generation_prompt": False}), ("llamacpp", {}),
])  # fmt: skip
@pytest.mark.parametrize(
    "pieces", [["there", "."], ["Hel", "lo ", "there."], ["Hello there."], ["Hell", "yes"], ["He"]]
)
def test_going_on_with_a_reply(server: Server, owner: str, sent: dict[str, Any], pieces: list[str]) -> None:
    server.models = {"data": [{"id": "x", "owned_by": owner}]}
    server.reply = chunks(*map(choice, pieces), STOP)
    remote = engine(server)
    *deltas, done = remote.stream(Request([*HI, Message("assistant", "Hello ")], remote.defaults, continue_final=True))
    assert isinstance(done, Done) and sent.items() <= asked(server).items()
    assert asked(server)["messages"][-1] == {"role": "assistant", "content": "Hello "}
    new = "".join(pieces)
    if owner == "llamacpp":  # which may begin by repeating; elsewhere it is new text that says the same again
        new = new.removeprefix("Hello ")
    assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == new
    assert done.text == new


# --- names ----------------------------------------------------------------------------------------------------------


def test_the_model_has_the_servers_name_everywhere(server: Server, cli: Cli) -> None:
    server.models = {"data": [{"id": "theirs"}]}
    start, *_ = map(json.loads, cli("generate", "--jsonl", "--url", server.url, "hi").out.splitlines())
    assert start["model"] == "theirs"
    cli("chat", "--url", server.url, stdin="hi\n")
    assert {entry["model"] for entry in json.loads(cli("sessions", "list", "--json").out)} == {"theirs"}
    result = cli("chat", "-c", "--url", server.url, stdin="/tokens\n/regen\n/system x\n/set\nmore\n")
    assert result.code == 0 and "was held with" not in result.err
    assert " 0 tokens" not in result.err and "the server's default" in result.err


# --- batches --------------------------------------------------------------------------------------------------------


def batch(tmp_path: Path, *lines: dict[str, Any]) -> tuple[Path, Path]:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return prompts, output


def records(output: Path) -> dict[int, dict[str, Any]]:
    return {record["index"]: record for record in map(json.loads, output.read_text().splitlines())}


def test_a_batch_asks_at_once_and_goes_on(server: Server, cli: Cli, tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=SOON)

    def reply(handler: Handler) -> None:
        if handler.asked.get("temperature") == 3:
            handler.answer(400, {"error": {"message": "temperature must be at most 2"}})
            return
        together.wait()  # no reply before four are asked for
        handler.begin()
        handler.piece(handler.asked["messages"][-1]["content"].upper(), "stop")
        handler.event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}})
        handler.end()

    server.reply = reply
    lines = [{"prompt": f"p{i}"} for i in range(8)]
    prompts, output = batch(tmp_path, *lines, {"prompt": "hot", "temperature": 3}, {"prompt": "s", "seed": 2**40})
    run = ("generate", "--batch", prompts, "--output", output, "--batch-size", "4", "--url", server.url)
    result = cli(*run, "-v")
    assert result.code == 1 and "40 tokens in" in result.err and "2 of 10 prompts got no answer" in result.err
    found = records(output)
    assert [found[i]["text"] for i in range(8)] == [f"P{i}" for i in range(8)]
    assert "--temperature" in found[8]["error"]["message"] and "line 10: seed must be" in found[9]["error"]["message"]
    asked_for = len(server.seen)
    result = cli(*run)  # without -m: the answers are this server's model's
    assert result.code == 1 and "8 of 10 prompts were answered before" in result.err
    assert sum(path.endswith("completions") for path, _, _ in server.seen[asked_for:]) == 1


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [(status(401, {}), 4, "answered 401"), (status(404, {"error": "no model x"}), 3, "no model x")],
)
def test_what_hits_all_lines_ends_a_batch(
    server: Server, cli: Cli, tmp_path: Path, fault: Send, code: int, words: str
) -> None:
    server.reply = fault
    prompts, output = batch(tmp_path, *[{"prompt": f"p{i}"} for i in range(40)])
    result = cli("generate", "-q", "--batch", prompts, "--output", output, "--url", server.url)
    assert result.code == code and words in result.fault and len(server.seen) < 30


def test_seeds_of_a_batch_begin_anew_behind_the_last(server: Server, cli: Cli, tmp_path: Path) -> None:
    prompts, output = batch(tmp_path, *[{"prompt": f"p{i}"} for i in range(3)])
    last = 2**31 - 1
    run = ("generate", "--batch", prompts, "--output", output, "--seed", str(last), "--url", server.url)
    assert cli(*run).code == 0
    assert [records(output)[i]["seed"] for i in range(3)] == [last, 0, 1]


def test_a_fault_that_ends_a_batch_keeps_what_came(server: Server) -> None:
    def reply(handler: Handler) -> None:
        (status(401, {}) if handler.asked["messages"][-1]["content"] == "1" else whole)(handler)

    def requests() -> Iterator[tuple[int, Request]]:
        for i in range(3):
            yield i, Request([Message("user", str(i))], remote.defaults)
        all_came.set()

    server.reply, remote, all_came = reply, engine(server), threading.Event()
    stream = answers(remote, requests(), 1)
    assert next(stream)[0] == 0 and all_came.wait(SOON)
    assert next(stream)[0] == 2
    with pytest.raises(AccessError):
        next(stream)


def test_faults_of_one_reply_do_not_end_a_batch(server: Server, cli: Cli, tmp_path: Path) -> None:
    tries: dict[str, int] = {}

    def reply(handler: Handler) -> None:
        prompt = handler.asked["messages"][-1]["content"]
        tries[prompt] = tries.get(prompt, 0) + 1
        if prompt == "busy" and tries[prompt] < 3:
            handler.answer(429, {"error": "slow down"}, retry_after="0")
        elif prompt == "flagged":
            handler.answer(403, {"error": "flagged"})
        elif prompt == "breaks":
            handler.answer(500, b"oh")
        elif prompt == "stops":
            handler.begin()
            handler.piece("half")
        else:
            whole(handler)

    server.reply = reply
    words = ("good", "busy", "flagged", "breaks", "stops", "more")
    prompts, output = batch(tmp_path, *[{"prompt": word} for word in words])
    result = cli("generate", "--batch", prompts, "--output", output, "--batch-size", "1", "--url", server.url)
    assert result.code == 1 and "3 of 6 prompts got no answer" in result.err
    found = records(output)
    assert {word for i, word in enumerate(words) if "error" in found[i]} == {"flagged", "breaks", "stops"}
    assert tries["busy"] == 3 and all(found[i]["text"] == TEXT for i in (0, 1, 5))


def test_a_batch_that_is_left_hangs_up(server: Server) -> None:
    def reply(handler: Handler) -> None:
        if handler.asked["messages"][-1]["content"] == "quick":
            whole(handler)
        else:
            after_pieces(Handler.hang)(handler)

    server.reply = reply
    remote = engine(server)
    requests = [(i, Request([Message("user", "quick" if i == 0 else "slow")], remote.defaults)) for i in range(3)]
    stream = answers(remote, requests, 3)
    assert next(stream)[0] == 0
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert server.gone.wait(SOON) and time.monotonic() - began < SOON


# --- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def secure(server: Server) -> Server:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server


def test_certificates(secure: Server, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    address = secure.url.replace("http:", "https:")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    result = cli("generate", "--no-log", "--url", address, "hi")
    assert result.code == 7 and "certificate" in result.fault and "SSL_CERT_FILE" in result.fault
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "certificate.pem"))
    assert cli("generate", "-q", "--no-log", "--url", address, "hi").out == TEXT + "\n"
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    result = cli("generate", "--no-log", "--url", address, "hi")
    assert result.code == 2 and "SSL_CERT_FILE" in result.fault
    result = cli("generate", "--no-log", "--url", secure.url, "hi")
    assert result.code == 7 and "https://?" in result.fault


def test_https_to_a_server_without(server: Server, cli: Cli) -> None:
    began = time.monotonic()
    result = cli("generate", "--no-log", "--url", server.url.replace("http:", "https:"), "hi")
    assert result.code == 7 and "does not answer in TLS" in result.fault and time.monotonic() - began < SOON
