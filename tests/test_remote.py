"""`--url` against a real server on this machine: what is asked, what is told, and 25 ways in which a server fails."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest

from dbrx_cli.engine import Delta, Done, Request, http_client
from dbrx_cli.engine.remote import RemoteEngine, ServerParams
from dbrx_cli.options import EngineOptions, OutputOptions
from dbrx_cli.report import Report
from model.errors import AccessError, ConnectionFault, ContextError, DbrxError, InputError, ModelError
from model.messages import Message
from model.sampling import PARAMETERS, SamplingParams
from tests.cli import SOON, Cli
from tests.forks import Forks
from tests.stub_server import PIECES, TEXT, Handler, Send, Server, after_pieces, pieces, status
from tests.terminal import spawn
from tests.test_imports import loaded_by

KEY = "sk-canary-4711"


def engine(server: Server, **options: Any) -> RemoteEngine:
    return RemoteEngine.open(EngineOptions(url=server.url, **options), Report(OutputOptions(quiet=True)))


def ask(engine: RemoteEngine, prompt: Any = None, **options: Any) -> Done:
    """The reply, checked to be what its pieces were."""
    params = options.pop("params", engine.defaults)
    *deltas, done = engine.stream(Request(prompt or [Message("user", "Hi")], params, **options))
    assert isinstance(done, Done) and all(isinstance(delta, Delta) for delta in deltas)
    assert done.text == "".join(delta.text for delta in deltas if isinstance(delta, Delta))
    return done


def test_a_reply(server: Server) -> None:
    done = ask(engine(server))
    assert (done.text, done.finish_reason, done.model) == (TEXT, "stop", "dbrx-a")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (11, 7)
    path, key, content = server.seen[-1]
    assert path == "/v1/chat/completions" and key is None
    assert content["messages"] == [{"role": "user", "content": "Hi"}] and content["stream"] is True
    assert set(content) == {
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
    }  # what nobody chose is not sent


def test_what_is_sent(server: Server) -> None:
    params = ServerParams(0.5, 0.8, 7, 0.1, 1.2, 0.3, 0.4, 99, 5)
    done = ask(engine(server), "Once", params=params, stop=("\n\n", "END"))
    path, _, content = server.seen[-1]
    assert path == "/v1/completions" and done.text == TEXT and done.seed == 5
    content.pop("stream"), content.pop("stream_options")
    assert content == {
        "model": "dbrx-a", "prompt": "Once", "max_tokens": 99, "temperature": 0.5, "top_p": 0.8, "seed": 5, "top_k": 7,
        "min_p": 0.1, "repetition_penalty": 1.2, "repeat_penalty": 1.2, "frequency_penalty": 0.3,
        "presence_penalty": 0.4, "stop": ["\n\n", "END"],
    }  # fmt: skip


def test_every_parameter_reaches_the_server(server: Server, cli: Cli, tmp_path: Path) -> None:
    """One that is added to `SamplingParams` has a flag, a key of a batch, and a field of the request."""
    values = {name: 1 if kind is int else 0.25 for name, kind in PARAMETERS.items() if name != "lookup"}
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert cli("generate", "--url", server.url, *flags, "hi").code == 0
    assert server.seen[-1][2].items() >= values.items()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "hi", **values}))
    assert cli("generate", "--url", server.url, "--batch", prompts).code == 0
    assert server.seen[-1][2].items() >= values.items()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/models"])
def test_spellings_of_the_address(server: Server, suffix: str) -> None:
    assert RemoteEngine.open(EngineOptions(url=server.url + suffix), Report(OutputOptions())).name == "dbrx-a"


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/", "http://", "http://a b/", "http://h:99999/", "http://u:p@h/", "http://h/?k=1",
            "http://[::1/", "http://h\x1b/"],
)  # fmt: skip
def test_addresses_that_are_none(cli: Cli, url: str) -> None:
    result = cli("generate", "--url", url, "hi")
    assert result.code == 2 and "--url" in result.fault and "\x1b" not in result.err


def test_which_model(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine(server, model="dbrx-b").name == "dbrx-b"
    assert engine(server).context == 4096 and engine(server, model="dbrx-b").context == 32768
    assert engine(server, context=100).context == 100
    RemoteEngine.open(EngineOptions(url=server.url), Report(OutputOptions()))
    assert "dbrx-a is taken" in capsys.readouterr().err
    server.models = {"data": []}
    assert engine(server, model="whatever").name == "whatever"
    with pytest.raises(ModelError, match="names no model"):
        engine(server)


def test_finish_reasons(server: Server) -> None:
    for reason, more, expected in (
        ("length", {}, "length"),
        ("stop", {"stop_reason": "END"}, "stop_string"),
        ("stop", {"stop_reason": 100279}, "stop"),
    ):

        def reply(handler: Handler, reason: str = reason, more: dict[str, Any] = more) -> None:
            handler.begin()
            handler.piece("x")
            handler.piece("", reason, **more)
            handler.event("[DONE]")
            handler.end()

        server.reply = reply
        assert ask(engine(server)).finish_reason == expected


def test_events_in_every_form_and_cut_at_every_byte(server: Server) -> None:
    choice = '{"choices": [{"delta": {"content": "\u00fc%s"}, "finish_reason": %s}]}'
    stream = (
        ": at work\r\n\r\n"
        f"event: x\r\nid: 1\r\ndata: {choice % ('a', 'null')}\r\n\r\n"
        f"data:{choice % ('b', 'null')}\n\n\n"
        'data: {"choices": \rdata: [{"delta": {"content": "c"}, "finish_reason": "stop"}]}\r\r'
        "data: [DONE]\n\n"
    ).encode()

    def reply(handler: Handler) -> None:
        handler.begin()
        for i in range(len(stream)):
            handler.raw(stream[i : i + 1])
        handler.end()

    server.reply = reply
    assert ask(engine(server)).text == "üaübc"


def test_the_key_goes_to_the_server_and_nowhere_else(server: Server, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    other = Server()
    threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("DBRX_API_KEY", KEY)
    ask(engine(server))
    assert {key for _, key, _ in server.seen} == {f"Bearer {KEY}"}
    for code in (301, 302, 303, 307, 308):
        server.reply = status(code, b"", location=f"{other.url}/v1/chat/completions")
        result = cli("generate", "--url", server.url, "hi")
        assert result.code == 7 and "redirects to" in result.err and KEY not in result.err + result.out
    server.reply = lambda handler: handler.answer(401, {"error": {"message": f"bad key {KEY}\x1b[2J"}})
    result = cli("generate", "--url", server.url, "-v", "hi")
    assert result.code == 4 and "bad key [key]" in result.err and "DBRX_API_KEY" in result.err
    assert KEY not in result.err and "\x1b" not in result.err
    assert other.seen == []
    other.shutdown()
    other.server_close()
    monkeypatch.setenv("DBRX_API_KEY", "two\nlines")
    with pytest.raises(AccessError):
        engine(server)


def test_no_proxy_stands_between_this_machine_and_itself(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask(engine(server)).text == TEXT


def test_ctrl_c_keeps_what_came_and_hangs_up(server: Server) -> None:
    def reply(handler: Handler) -> None:
        pieces(handler)
        handler.hang()

    server.reply = reply
    stream = engine(server).stream(Request([Message("user", "Hi")], SamplingParams()))
    assert next(stream) == Delta(PIECES[0], None)
    done = stream.throw(KeyboardInterrupt())
    assert isinstance(done, Done) and (done.text, done.finish_reason) == (PIECES[0], "interrupted")
    assert server.gone.wait(SOON)


def test_what_the_protocol_has_no_words_for(server: Server, cli: Cli) -> None:
    remote = engine(server)
    turns = [Message("user", "Hi"), Message("assistant", "Hello")]
    with pytest.raises(InputError, match="not known to go on"):
        next(remote.stream(Request(turns, remote.defaults, continue_final=True)))
    with pytest.raises(InputError, match="--resume is not possible with --url"):
        next(remote.stream(Request(turns, remote.defaults, resume=Path("x"))))


def test_counts_learn_from_the_server(server: Server) -> None:
    remote = engine(server)
    messages = [Message("user", "word " * 300)]
    assert remote.count(messages) == pytest.approx(1500 / 4 + 10, abs=2) and remote.unread(messages) is None

    def reply(handler: Handler) -> None:
        handler.begin()
        handler.piece("ok", "stop")
        handler.event({"choices": [], "usage": {"prompt_tokens": 760, "completion_tokens": 1}})
        handler.event("[DONE]")
        handler.end()

    server.reply = reply
    ask(remote, messages)
    assert remote.count(messages) == pytest.approx(760, abs=2)


# --- faults ---------------------------------------------------------------------------------------------------------


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def in_the_stream(*contents: Any) -> Send:
    return after_pieces(lambda handler: [handler.event(content) for content in contents] and handler.end())


def drip(handler: Handler) -> None:
    for _ in range(100):
        handler.raw(b"x")
        time.sleep(0.05)


def drip_the_head(handler: Handler) -> None:
    for byte in b"HTTP/1.1 200 OK\r\n" + b"x-a: b\r\n" * 40:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.05)


def half_a_chunk(handler: Handler) -> None:
    handler.wfile.write(b"ff\r\ndata: {")


def wrong_length(handler: Handler) -> None:
    body = b'data: {"choices": [{"delta": {"content": "The sea"}, "finish_reason": null}]}\n\n'
    handler.answer(200, body, content_length="9999", content_type="text/event-stream")


def no_status(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


def long_line(handler: Handler) -> None:
    for _ in range(40):
        handler.raw(b"data: " + b"x" * 65536)


FAULTS: dict[str, tuple[Send, int]] = {
    "closes at once": (lambda handler: None, 7),
    "resets at once": (reset, 7),
    "speaks another protocol": (no_status, 7),
    "is silent": (Handler.hang, 7),
    "drips its head": (drip_the_head, 7),
    "is silent after the head": (lambda handler: (handler.begin(), handler.hang())[0], 7),
    "is silent in the reply": (after_pieces(Handler.hang), 7),
    "drips half a line": (after_pieces(drip), 7),
    "resets in the reply": (after_pieces(reset), 7),
    "closes in the reply": (after_pieces(lambda handler: None), 7),
    "ends without a reason": (after_pieces(Handler.end), 7),
    "cuts a chunk": (after_pieces(half_a_chunk), 7),
    "sends less than it announced": (wrong_length, 7),
    "sends an error in the reply": (in_the_stream({"error": {"message": "out of memory\x1b[31m"}}), 7),
    "sends an error without words": (in_the_stream({"error": "bad"}), 7),
    "sends what is no JSON": (in_the_stream('{"choices": ['), 7),
    "sends a list": (in_the_stream([1, 2]), 7),
    "sends choices that are none": (in_the_stream({"choices": [3]}), 7),
    "sends choices that are a number": (in_the_stream({"choices": 3}), 7),
    "sends bytes that are not UTF-8": (after_pieces(lambda handler: handler.raw(b"data: \xff\xfe\n\n")), 7),
    "sends a line without an end": (after_pieces(long_line), 7),
    "filters the reply": (after_pieces(lambda handler: (handler.piece("", "content_filter"), handler.end())[0]), 7),
    "sends a page": (status(200, b"<html>Welcome</html>"), 7),
    "lacks the path": (status(404, b"<html>Not found</html>"), 7),
    "lacks the model": (status(404, {"error": {"message": "The model `x` does not exist."}}), 3),
    "forbids": (status(403, {"detail": "no"}), 4),
    "asks for a key": (status(401, b""), 4),
    "has too small a context": (status(400, {"message": "maximum context length is 10 tokens"}), 6),
    "does not know an option": (status(422, {"detail": [{"msg": "extra fields"}]}), 1),
    "is overloaded": (status(503, {"error": {"message": "busy"}}, retry_after="1"), 7),
    "breaks": (status(500, b"x" * 100_000), 7),
    "breaks while it says why": (status(500, b"oh", content_length="500"), 7),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_as_it_is(server: Server, cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(http_client, "FIRST_SECONDS", http_client.IDLE_SECONDS)
    server.reply, code = FAULTS[name]
    began = time.monotonic()
    result = cli("generate", "--json", "--no-log", "--url", server.url, "hi")
    assert time.monotonic() - began < SOON
    assert result.code == code
    # What came, with the fault beside it, or nothing; and one clear line (beside the notice of which model is taken).
    if result.out:
        answer = json.loads(result.out)
        assert (answer["finish_reason"], answer["error"]["code"]) == ("interrupted", code)
        assert answer["text"] and TEXT.startswith(answer["text"])
    notice, *_, fault = result.err.splitlines()
    assert "is taken" in notice and fault.startswith("dbrx: 127.0.0.1") and len(fault) < 500
    assert "\x1b" not in result.err and "internal error" not in fault


def test_a_reply_without_an_end(server: Server, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(handler: Handler) -> None:
        handler.begin()
        while True:
            handler.piece("more " * 100)

    monkeypatch.setattr("dbrx_cli.engine.remote.LARGEST_ANSWER", 10_000)
    server.reply = endless
    result = cli("generate", "--no-log", "-m", "dbrx-a", "--url", server.url, "-n", "5", "hi")
    assert (result.code, len(result.out.strip())) == (7, 10_499) and "does not end its reply" in result.fault


def test_no_server_at_all(cli: Cli) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = cli("generate", "--url", f"http://127.0.0.1:{port}", "hi")
    assert result.code == 7 and "cannot be reached" in result.fault
    result = cli("chat", "--url", f"http://127.0.0.1:{port}", stdin="hi\n")
    assert result.code == 7 and "cannot be reached" in result.fault


@pytest.mark.parametrize("models", [b"<html>", {"data": 3}, {"object": "list"}, b"[" * 100_000])
def test_what_is_no_such_server(server: Server, models: Any) -> None:
    server.models = models
    with pytest.raises(ConnectionFault, match="does not answer like"):
        engine(server)


def test_the_faults_are_children_of_one_error(server: Server) -> None:
    server.reply = status(400, {"message": "context too long"})
    with pytest.raises(ContextError):
        ask(engine(server))
    server.reply = after_pieces(reset)
    *seen, done = engine(server).stream(Request("x", SamplingParams()))
    assert seen and isinstance(done, Done) and isinstance(done.error, DbrxError)
    assert (done.text, done.finish_reason) == (TEXT, "interrupted")


# --- the program ----------------------------------------------------------------------------------------------------


def test_generate_and_a_scripted_chat(server: Server, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("generate", "-q", "--no-log", "--url", server.url, "hi").out == TEXT + "\n"
    monkeypatch.setenv("DBRX_URL", server.url)
    answer = json.loads(cli("generate", "-q", "--no-log", "--json", "hi").out)
    assert answer["text"] == TEXT and answer["model"] == "dbrx-a" and answer["token_ids"] == []
    result = cli("chat", "-q", "-s", "Be brief.", stdin="one\ntwo\n")
    assert result.code == 0 and result.out == (TEXT + "\n") * 2
    assert [m["role"] for m in server.seen[-1][2]["messages"]] == ["system", "user", "assistant", "user"]
    result = cli("generate", "--prompt-cache", "x", "hi")
    assert result.code == 2 and "--prompt-cache" in result.err.splitlines()[-1]


def test_a_server_is_talked_to_without_torch(server: Server) -> None:
    code = f"""
import os; os.environ["DBRX_URL"] = {server.url!r}; os.environ["DBRX_DATA"] = {os.devnull!r}
from dbrx_cli.app import app
try: app(["generate", "-q", "--no-log", "hi"])
except SystemExit: pass
"""
    assert not {"torch", "accelerate", "tiktoken", "huggingface_hub", "numpy"} & loaded_by(code)


def test_a_chat_says_nothing_of_what_a_server_does_not_tell(server: Server, cli: Cli) -> None:
    told = cli("chat", "--url", server.url, "--no-log", stdin="hi\n/show\n/stats\n/set\n").err
    assert "the server's default: likeliest tokens; 0 for all" in told and "last reply" in told
    assert "remote" not in told and "was loaded" not in told


@pytest.mark.slow
def test_the_prompt_of_a_chat_is_there_at_once(server: Server) -> None:
    terminal = spawn("chat", "--url", server.url)
    terminal.expect("dbrx-a, 4,096 tokens of context.*>>>")
    terminal.send("hi\r")
    terminal.expect("The sea.*>>>")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)


@pytest.mark.slow
def test_ctrl_c_in_the_program(server: Server, forks: Forks) -> None:
    def reply(handler: Handler) -> None:
        pieces(handler)
        handler.hang()

    server.reply = reply
    with forks.piped("generate", "-q", "--no-log", "--url", server.url, "hi") as process:
        first = os.read(process.stdout.fileno(), 7)
        process.send_signal(2)
        rest, err = process.stdout.read(), process.stderr.read()
        assert process.wait() == 130 and (first + rest).decode().startswith("The sea") and err == b""
    assert server.gone.wait(SOON)
