"""Requests to an OpenAI-compatible server: who may see the key, how long to wait, what an answer means."""

from __future__ import annotations

import codecs
import contextlib
import ipaddress
import json
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2

from model.errors import AccessError, ConnectionFault, ContextError, DbrxError, InputError, ModelError

KEY = "DBRX_API_KEY"
CONNECT_SECONDS = 10.0
FIRST_SECONDS = 600.0  # until something comes at all: a long prompt on a slow machine takes minutes to read
IDLE_SECONDS = 60.0  # between two lines of a reply
LARGEST_LINE = 1 << 20  # bytes; a token's line has some hundred
LARGEST_ANSWER = 8 << 20
TRY_AGAIN = "try again, or see what the server logs"


@dataclass(frozen=True)
class Server:
    """Where the server is, and the key that goes there and nowhere else."""

    base: str  # ends in /v1
    key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str) -> Server:
        """From --url, with or without /v1, and the key from the environment."""
        try:
            parts = urlsplit(url.strip())
            fits = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
        except ValueError:
            fits = False
        if not fits or not url.isprintable() or " " in url.strip():
            raise InputError("--url is not the address of a server", "it looks like http://127.0.0.1:8000")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise InputError("--url holds more than an address", f"put the key into {KEY}")
        path = re.sub(r"/(chat/completions|completions|models)$", "", parts.path.rstrip("/"))
        if not path.endswith("/v1"):
            path += "/v1"
        key = os.environ.get(KEY) or None
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise AccessError(f"{KEY} holds characters that no key has", f"set {KEY} again")
        return cls(f"{parts.scheme}://{parts.netloc}{path}", key)

    @property
    def host(self) -> str:
        """How messages name it."""
        return urlsplit(self.base).netloc

    def get(self, path: str) -> Any:
        """A parsed answer of a GET."""
        with Answer(self, "GET", path) as answer:
            try:
                return json.loads(answer.body(CONNECT_SECONDS))
            except (ValueError, RecursionError):
                raise self._no_server() from None

    def post(self, path: str, content: dict[str, Any]) -> Answer:
        """A streamed answer of a POST."""
        return Answer(self, "POST", path, content)

    def refusal(self, response: httpx2.Response, body: bytes) -> DbrxError:
        """What a status other than 200 means."""
        status, said = response.status_code, self.said(_message(body))
        answered = f"{self.host} answered {status}" + (f" ({said})" if said else "")
        if 300 <= status < 400:
            place = self.said(response.headers.get("location", "another place"))
            return ConnectionFault(f"{self.host} redirects to {place}", "if you trust it, give that address to --url")
        if status in (401, 403):
            return AccessError(answered, f"set {KEY} to a key that this server takes")
        if status == 413 or (status == 400 and re.search(r"context|too long|maximum.*tokens", said, re.IGNORECASE)):
            return ContextError(answered, "shorten the prompt, or lower --max-tokens")
        if status == 404 and "model" in said.lower():
            return ModelError(answered, "name one that the server has with -m, or leave -m out")
        if status in (404, 405):
            return ConnectionFault(answered, "check --url: the address of an OpenAI-compatible server")
        if status in (400, 422):
            return DbrxError(answered, "the server does not take this request: leave out an option")
        return ConnectionFault(answered, TRY_AGAIN)

    def said(self, text: str) -> str:
        """Words of the server on one line; if it repeats the key, the key is left out."""
        words = " ".join(text.split())[:300]
        if self.key:
            words = words.replace(self.key, "[key]")
        return "".join(c for c in words if c.isprintable())

    def _no_server(self) -> ConnectionFault:
        return ConnectionFault(f"{self.host} does not answer like an OpenAI-compatible server", "check --url")


class Answer:
    """One answer as it comes.

    A thread of its own waits for the network, so that neither Ctrl-C nor the end of patience has to wait for a system
    call. Redirects are not followed, and every request has its own connection: one from before may be dead.
    """

    def __init__(self, server: Server, method: str, path: str, content: dict[str, Any] | None = None) -> None:
        self._server = server
        self._arrived: queue.SimpleQueue[httpx2.Response | bytes | Exception | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._response: httpx2.Response | None = None
        arguments = (method, f"{server.base}/{path}", content)
        threading.Thread(target=self._read, args=arguments, daemon=True).start()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def body(self, seconds: float) -> bytes:
        """The whole body; `DbrxError` if the status is not 200, or it has not come within so many seconds."""
        return b"".join(self._parts(time.monotonic() + seconds))

    def events(self) -> Iterator[str]:
        """The data of each server-sent event (WHATWG HTML, 9.2); `ConnectionFault` when nothing comes for too long."""
        deadline = time.monotonic() + FIRST_SECONDS
        self._head(deadline)
        decoder = codecs.getincrementaldecoder("utf-8")()
        patience, held = FIRST_SECONDS, ""
        data: list[str] = []
        while (part := self._next(deadline)) is not None:
            assert isinstance(part, bytes)
            try:
                held += decoder.decode(part)
            except UnicodeDecodeError:
                raise ConnectionFault(f"{self._server.host} sent bytes that are not UTF-8", TRY_AGAIN) from None
            # A carriage return at the end may be half of an end of line.
            cut = len(held) - 1 if held.endswith("\r") else len(held)
            *lines, rest = re.split("\r\n|\n|\r", held[:cut])
            held = rest + held[cut:]
            if len(held) > LARGEST_LINE or sum(map(len, data)) > LARGEST_LINE:
                raise ConnectionFault(f"{self._server.host} sent a line without an end", TRY_AGAIN)
            for line in lines:
                if line.startswith("data:"):
                    data.append(line[5:].removeprefix(" "))
                elif not line and data:
                    patience = IDLE_SECONDS
                    yield "\n".join(data)
                    data = []
            if lines:  # a comment counts: servers send them to say that they are at work
                deadline = time.monotonic() + patience

    def close(self) -> None:
        """Hang up, so that the server stops computing."""
        self._stop.set()
        if self._response is not None:
            stream = self._response.extensions.get("network_stream")
            connection = stream.get_extra_info("socket") if stream is not None else None
            if connection is not None:  # wakes the thread that reads from it; closing alone would not
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _read(self, method: str, url: str, content: dict[str, Any] | None) -> None:
        headers = {"accept-encoding": "identity", "user-agent": "dbrx"}
        if self._server.key:
            headers["authorization"] = f"Bearer {self._server.key}"
        timeout = httpx2.Timeout(FIRST_SECONDS + IDLE_SECONDS, connect=CONNECT_SECONDS)
        try:
            with (
                httpx2.Client(timeout=timeout, trust_env=not _is_loopback(url)) as client,
                client.stream(method, url, json=content, headers=headers) as response,
            ):
                self._response = response
                self._arrived.put(response)
                for part in response.iter_bytes():
                    if self._stop.is_set():
                        return
                    self._arrived.put(part)
            self._arrived.put(None)
        except Exception as error:  # told by the one who waits
            self._arrived.put(error)

    def _next(self, deadline: float) -> httpx2.Response | bytes | None:
        try:
            arrived = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise ConnectionFault(f"{self._server.host} sent nothing for too long", TRY_AGAIN) from None
        if isinstance(arrived, Exception):
            raise self._fault(arrived) from None
        return arrived

    def _head(self, deadline: float) -> httpx2.Response:
        response = self._next(deadline)
        assert isinstance(response, httpx2.Response)
        if response.status_code != 200:
            body = b""
            with contextlib.suppress(ConnectionFault):
                for part in self._rest(min(deadline, time.monotonic() + CONNECT_SECONDS)):
                    body += part
            raise self._server.refusal(response, body)
        return response

    def _parts(self, deadline: float) -> Iterator[bytes]:
        self._head(deadline)
        yield from self._rest(deadline)

    def _rest(self, deadline: float) -> Iterator[bytes]:
        total = 0
        while isinstance(part := self._next(deadline), bytes):
            total += len(part)
            if total > LARGEST_ANSWER:
                raise ConnectionFault(f"{self._server.host} sent too much", TRY_AGAIN)
            yield part

    def _fault(self, error: Exception) -> ConnectionFault:
        """A fault of the transport; its own text may hold headers and is not repeated."""
        host = self._server.host
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            return ConnectionFault(f"{host} cannot be reached", "check --url and that the server runs")
        if isinstance(error, httpx2.TimeoutException):
            return ConnectionFault(f"{host} stopped answering", TRY_AGAIN)
        if isinstance(error, httpx2.HTTPError):
            return ConnectionFault(f"{host} broke off the connection", TRY_AGAIN)
        return ConnectionFault(f"{host} cannot be asked ({type(error).__name__})", "check --url")


def _message(body: bytes) -> str:
    """What an error's body says: OpenAI's form, others' forms, or its first words."""
    text = body[:65536].decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "" if text.lstrip().startswith("<") else text
    for key in ("error", "detail", "message"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value)


def _is_loopback(url: str) -> bool:
    """A server on this machine is never asked through a proxy."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
