"""`dbrx serve`: who may ask, what is bounded, who is held up by nobody; from start to end."""

from __future__ import annotations

import json
import math
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dbrx_cli.addresses import listen
from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.options import OutputOptions
from dbrx_cli.report import Report
from dbrx_cli.running import Record
from dbrx_cli.server import app, run, streaming
from dbrx_cli.server.safety import Guard
from dbrx_cli.server.service import Limits, Service
from dbrx_cli.server.worker import Pace
from model.errors import InputError
from model.sampling import SamplingParams
from model.sequence import Sequence
from tests.cli import Cli
from tests.forks import Forks
from tests.served import Served, until
from tests.test_server import engine_of, user

KEY = "a-long-random-text"
LONG = {"prompt": "Hello", "max_tokens": 200, "temperature": 0, "logit_bias": {"256": -100, "303": -100}}


@pytest.fixture(scope="module")
def engine(small_checkpoint: Path) -> LocalEngine:
    return engine_of(small_checkpoint)


@pytest.fixture(scope="module")
def locked(engine: LocalEngine) -> Iterator[Served]:
    """With a key, and one origin that may ask."""
    with Served(lambda: engine, key=KEY, origins=("https://pages.example",)) as running:
        yield running


def sent(
    served: Served, body: dict[str, Any], receive_bytes: int | None = None, content_length: int | None = None
) -> socket.socket:
    """A connection on which a request was sent, and nothing is read. content_length: another one than it has."""
    host, port = served.url.removeprefix("http://").removesuffix("/v1").split(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect((host, int(port)))
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {content_length or len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def status(served: Served, headers: dict[str, str], path: str = "models", method: str = "GET") -> int:
    """What is answered to these headers, and none that `served.client` has of its own."""
    asked = httpx2.Request(method, f"{served.url}/{path}", headers=headers)
    return served.client.send(asked).status_code


def test_an_address_that_others_reach_needs_a_key(cli: Cli, small_checkpoint: Path) -> None:
    told = cli("serve", "-m", small_checkpoint, "--host", "0.0.0.0")
    assert told.code == 2 and "no key protects it; set DBRX_API_KEY" in told.fault
    Guard("0.0.0.0", KEY)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost", "LocalHost.", "dev.localhost", "::ffff:127.0.0.1"):
        Guard(host, None)
    for host in ("::", "192.168.0.1", "localhost.example", "notlocalhost", "", "::ffff:10.0.0.1", "127.1"):
        with pytest.raises(InputError, match="other machines"):
            Guard(host, None)


def test_a_key_opens(locked: Served) -> None:
    assert locked.client.get("models").status_code == 200
    wrong: list[dict[str, str]] = [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Bearer {KEY}x"}]
    for headers in wrong:
        assert status(locked, headers) == status(locked, headers, "../metrics") == 401
        assert status(locked, headers, "chat/completions", "POST") == 401
        assert status(locked, headers, "../health") == 200
    told = locked.client.send(httpx2.Request("GET", f"{locked.url}/models")).json()["error"]
    assert (told["type"], told["code"]) == ("authentication_error", "invalid_api_key")


def test_a_second_write_does_not_wait_for_the_first() -> None:
    """Connections send at once what is written: else a request took 44 ms instead of 2."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_pages_are_refused(locked: Served, engine: LocalEngine) -> None:
    allowed = {"authorization": f"Bearer {KEY}"}
    assert status(locked, allowed | {"origin": "https://evil.example"}) == 403
    assert status(locked, allowed | {"origin": "null"}) == 403
    assert status(locked, allowed | {"host": "my-machine:8000"}) == 200  # a page would not know the key
    with Served(lambda: engine) as unlocked:
        for host in ("localhost:1", "127.0.0.1", "[::1]:8000", "app.localhost:80"):
            assert status(unlocked, {"host": host}) == 200
        for host in (
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "",
            "[::1",
            "[::1]evil.example",
            "localhost:a@b",
        ):
            assert status(unlocked, {"host": host}) == 403, host
        assert status(unlocked, {"origin": "http://localhost:3000"}) == 403


def test_allowed_pages(locked: Served) -> None:
    origin = {"origin": "https://pages.example"}
    ask = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answer = locked.client.send(httpx2.Request("OPTIONS", f"{locked.url}/chat/completions", headers=ask))
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://pages.example"
    assert status(locked, origin) == 401 and status(locked, origin | {"authorization": f"Bearer {KEY}"}) == 200


def test_what_is_too_large_is_refused(locked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "LARGEST_BODY", 1000)
    assert locked.post("completions", prompt="x" * 2000).status_code == 413
    parts = (b"x" * 100 for _ in range(20))
    assert locked.client.post("completions", content=parts).status_code == 413  # no length is told
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}}
    monkeypatch.undo()
    form = {"type": "json_schema", "json_schema": {"schema": wide}}
    answer = locked.post("chat/completions", messages=user("x"), response_format=form)
    assert answer.status_code == 400 and "more than 65536" in answer.json()["error"]["message"]


def test_a_body_that_does_not_come_is_not_waited_for(locked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)
    host, port = locked.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: 9\r\n\r\n"
        slow.sendall(head.encode())
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_time_is_limited(engine: LocalEngine) -> None:
    with Served(lambda: engine, Limits(rows=1, seconds=0.05)) as served:
        answer = served.post("completions", **LONG)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "timeout"
        *_, last = served.stream("completions", **LONG)
        assert isinstance(last, dict) and last["error"]["code"] == "timeout", "and no [DONE]"
        until(lambda: not served.service.worker.running)


def test_who_hangs_up_within_a_body_leaves_nothing(engine: LocalEngine, caplog: pytest.LogCaptureFixture) -> None:
    with Served(lambda: engine) as served:
        counted = 'dbrx_http_answers_total{path="/v1/completions",status="499"} 1.0'
        sent(served, LONG, content_length=10_000).close()
        until(lambda: counted in served.client.get("metrics").text)
    assert not [each for each in caplog.records if each.name.startswith("uvicorn")]


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_place(engine: LocalEngine, stream: bool) -> None:
    with Served(lambda: engine, Limits(rows=1, queue=3)) as served:
        body = {**LONG, "stream": stream}
        running = sent(served, body)
        until(lambda: served.service.worker.running == 1)
        waiting = sent(served, body)  # one that waits may go, too
        until(lambda: served.service.worker.waiting == 1)
        running.close()
        waiting.close()
        until(lambda: not served.service.open and not served.service.worker.running)
        assert served.chat("Hello")["usage"]["completion_tokens"] == 12
        assert "dbrx_completion_tokens_total 12.0" in served.client.get("metrics").text


def test_a_full_queue_says_when_to_come_back(engine: LocalEngine) -> None:
    with Served(lambda: engine, Limits(rows=1, queue=0)) as served:
        with served.standing(), sent(served, LONG):
            until(lambda: served.service.worker.waiting == 1)
            answer = served.post("completions", prompt="Hello", max_tokens=1)
            known = served.service.worker.pace.step_s * LONG["max_tokens"]  # no reply was seen yet
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) == math.ceil(known)
        never = served.post("completions", prompt="Hello", n=2)  # a 429 would be asked again for ever
        assert never.status_code == 400 and "more than the 1 that" in never.json()["error"]["message"]
        until(lambda: not served.service.open)
        assert served.post("completions", prompt="Hello", max_tokens=1).status_code == 200


def test_when_a_place_is_free_is_told_from_what_was_seen() -> None:
    pace, row = Pace(), Sequence([1], SamplingParams(max_tokens=100), reply=[2] * 10)
    pace.note_step(0.5)
    assert pace.seconds_left(row) == 90 * 0.5, "no reply was seen yet: it may take all of its tokens"
    pace.note_reply(30)
    assert pace.seconds_left(row) == 20 * 0.5
    pace.note_step(1.5)
    pace.note_reply(0)
    assert pace.seconds_left(row) == pytest.approx(17 * 0.6)


def test_a_client_that_does_not_read(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WRITE_SECONDS", 0.2)
    served = Served(lambda: engine)
    served.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with served, sent(served, {**LONG, "stream": True, "n": 2, "logprobs": 20}, receive_bytes=1024) as slow:
        until(lambda: served.service.open == 2)
        assert served.chat("Hello")["usage"]["completion_tokens"] == 12
        until(lambda: not served.service.open)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # the rest in seconds less
        taken = b""
        while more := slow.recv(1 << 16):
            taken += more
        assert not taken.endswith(b"0\r\n\r\n"), "it was cut off, and shows that"


def test_a_comment_comes_while_nothing_else_does(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbrx_cli.server.tickets.KEEP_ALIVE_SECONDS", 0.001)
    with Served(lambda: engine) as served:
        events = list(served.stream("completions", **{**LONG, "max_tokens": 12}))
        assert ": keep-alive" in events and events[-1] == "[DONE]"


def test_what_lacks_memory_ends_and_the_next_is_answered(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Served(lambda: engine) as served:
        scheduler, step = served.service.worker._scheduler, served.service.worker._scheduler.step

        def fails() -> Any:
            raise faults.pop()

        for fault, code in ((MemoryError(), "out_of_memory"), (RuntimeError("no matter"), None)):
            faults = [fault]
            monkeypatch.setattr(scheduler, "step", fails)
            answer = served.post("completions", prompt="Hello", max_tokens=2)
            assert answer.status_code == 500 and answer.json()["error"]["code"] == code
            assert served.chat("Hello")["usage"]["completion_tokens"] == 12
            scheduler, step = served.service.worker._scheduler, step
    assert "no matter" in capsys.readouterr().err


def test_while_it_loads_it_says_so(engine: LocalEngine) -> None:
    go_on = threading.Event()

    def load() -> LocalEngine:
        go_on.wait(30)
        return engine

    served = Served(load)
    served.waits = False
    with served:
        for method, path in (("GET", "../health"), ("GET", "models"), ("POST", "chat/completions")):
            answer = served.client.request(method, path, json={"messages": user("x")})
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
            assert answer.headers["retry-after"] == "5"
        go_on.set()
        until(lambda: served.client.get("../health").status_code == 200)


@pytest.mark.slow
def test_a_process_from_start_to_end(forks: Forks, small_checkpoint: Path) -> None:
    with forks.piped("serve", "-m", small_checkpoint, "--port", "0", "--parallel", "1") as process:
        told = process.stderr.readline().decode()
        url = told.split(" at ")[1].split(";")[0]
        with httpx2.Client(base_url=url, trust_env=False, timeout=60) as client:
            with client.stream("POST", "completions", json={**LONG, "stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert [*lines][-2] == "data: [DONE]", "what was begun is completed"
        assert process.wait() == 0
        rest = process.stderr.read().decode()
        assert rest == "dbrx: replies on their way: 1; Ctrl-C again ends them at once\n", "no prompt, no reply"
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/models", trust_env=False)


def test_a_ctrl_c_before_it_hears_signals_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the thread that loads would say so on a terminal, and nobody wipes its line."""
    loaded: list[bool] = []

    def load() -> LocalEngine:
        loaded.append(True)
        raise InputError("it has begun")

    def late(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return Service(*given)

    monkeypatch.setattr(run, "Service", late)
    record = Record(0, "http://127.0.0.1:1", "m", {}, False)
    others = run.Ends(1, None), listen("127.0.0.1", 0), Limits(), Guard("127.0.0.1", None), Report(OutputOptions())
    with pytest.raises(KeyboardInterrupt), others[1]:
        run.serve(load, record, [], *others)
    assert not loaded


def test_faults_before_it_serves(cli: Cli, small_checkpoint: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = cli("serve", "-m", small_checkpoint, "--port", str(taken.getsockname()[1]))
        assert told.code == 2 and "Address already in use; give an address of this machine" in told.fault
    told = cli("serve", "-m", tmp_path / "nothing", "--port", "0")
    assert told.code == 3 and "nothing" in told.fault
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama"}')
    assert cli("serve", "-m", tmp_path / "broken", "--port", "0").code == 3
