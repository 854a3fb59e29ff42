"""Requests to an OpenAI-compatible server: who may see the key, how long to wait, what an answer means."""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import os
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from dbrx_cli.addresses import is_loopback
from dbrx_cli.options import KEY, given_key
from model.errors import AccessError, ConnectionFault, ContextError, DbrxError, InputError, ModelError
from model.hub.retry import FEW_TRIES, RetryPolicy, Transient
from model.json_text import LISTING, parse

T = TypeVar("T")

CONNECT_SECONDS = 6.0  # for the connection, and once more for TLS
HEAD_SECONDS = 20.0  # for the head of an answer, from its first byte on
LIST_SECONDS = 15.0  # for the list of models
FIRST_SECONDS = 600.0  # of silence before the first text: a long prompt on a slow machine takes minutes to read
IDLE_SECONDS = 60.0  # of silence between two lines of a reply
SIGNS = 6  # how often signs of life without any text renew that patience
POLL_SECONDS = 0.5
LARGEST_LINE = 1 << 20  # bytes; a token's line has some hundred
LARGEST_ANSWER = 8 << 20
LARGEST_COUNT = 2**53  # of tokens: beyond it is nonsense, and no float
TRY_AGAIN = "try again, or see what the server logs"
TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size|limit)|maximum context|exceed.*context|context.*exceed|too long"
    r"|maximum.*tokens|tokens.*maximum|(input|prompt) length|fewer tokens|less than.*tokens"
)


class OneReply(ConnectionFault):
    """A fault of one reply: the server may well give the next one."""


class Passing(OneReply):
    """A fault that passes, most likely: the server asks for patience, for so many seconds if it says how many."""

    seconds: float | None = None
    tries: int | None = None  # after how many it is given up


class NoPath(ConnectionFault):
    """Nothing that speaks the protocol answers under this path."""


class Forbidden(AccessError):
    """The key is known, but not for this."""


class Refused(DbrxError):
    """The server understands the request and does not take it."""


@dataclass(frozen=True)
class Server:
    """Where the server is, and the key that goes there and nowhere else."""

    bases: tuple[str, ...]  # where its paths may begin, the likeliest first; one as soon as that is known
    key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str) -> Server:
        """From --url, and the key from the environment.

        An address without a path, or with another one than /v1, may mean itself or /v1 behind it.
        """
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
        paths = (path,) if path.endswith("/v1") else (path, f"{path}/v1") if path else ("/v1", "")
        return cls(tuple(f"{parts.scheme}://{parts.netloc}{path}" for path in paths), given_key())

    @property
    def host(self) -> str:
        """How messages name it."""
        return urlsplit(self.bases[0]).netloc

    def each(self) -> Iterator[Server]:
        """The server with each of its bases alone."""
        return (replace(self, bases=(base,)) for base in self.bases)

    def get(self, path: str) -> Any:
        """A parsed answer of a GET under the first base; None if it is no JSON."""
        with Answer(self, "GET", path) as answer:
            try:
                return parse(answer.body(LIST_SECONDS), LISTING)
            except ValueError:
                return None

    def post(self, path: str, content: dict[str, Any]) -> Answer:
        """A streamed answer of a POST under the first base."""
        return Answer(self, "POST", path, content)

    def refusal(self, status: int, said: str, asked: bool = True) -> DbrxError:
        """What a status other than 200 means. asked: for a reply, in which `said` may speak of the model."""
        said = self.said(said)
        answered = f"{self.host} answered {status}" + (f" ({said})" if said else "")
        if status == 403:
            return Forbidden(answered, f"set {KEY} to a key that may do this")
        if status in (401, 402):
            return AccessError(answered, f"set {KEY} to a key that this server takes")
        if status == 413 or (status in (400, 422) and TOO_LONG.search(said.lower())):
            return ContextError(answered, "shorten the prompt, or lower --max-tokens")
        if status == 404 and asked and "model" in said.lower():
            return ModelError(answered, "name one that the server has with -m, or leave -m out")
        if status in (404, 405, 501):
            return NoPath(answered, "check --url: the address of an OpenAI-compatible server")
        if status in (400, 422):
            return Refused(answered, "the server does not take this request: leave out an option")
        if status in (408, 425, 429) or status >= 500:
            passing = Passing(answered, TRY_AGAIN)
            passing.tries = FEW_TRIES if status == 500 else None  # it may well be the request's own fault
            return passing
        return OneReply(answered, TRY_AGAIN)

    def said(self, text: str) -> str:
        """Words of the server on one line; if it repeats the key, the key is left out."""
        if self.key:
            text = text.replace(self.key, "[key]")
        return "".join(c for c in " ".join(text.split())[:300] if c.isprintable())

    def no_server(self) -> NoPath:
        """The fault of what answers, but in no form of the protocol."""
        return NoPath(f"{self.host} does not answer like an OpenAI-compatible server", "check --url")


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
        self._method = method
        self._step = ""  # of the transport, as httpcore names it
        self._head_at: float | None = None  # when the first bytes of a head came that is not whole yet
        self._heard_at = self._text_at = time.monotonic()
        self._patience = FIRST_SECONDS
        arguments = (method, f"{server.bases[0]}/{path}", content)
        threading.Thread(target=self._read, args=arguments, daemon=True).start()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def body(self, seconds: float) -> bytes:
        """The whole body; `DbrxError` if the status is not 200, or it has not come within so many seconds."""
        deadline = time.monotonic() + seconds
        self._head(deadline)
        return b"".join(self._rest(deadline))

    def head(self) -> None:
        """Wait until the server takes the request; `DbrxError` if it does not."""
        self._head(self._deadline)

    def events(self) -> Iterator[tuple[str, str]]:
        """Name and data of each server-sent event (WHATWG HTML, 9.2), behind `head`.

        A body that is JSON as a whole is one event. `ConnectionFault` when nothing comes for too long.
        """
        name, data = "", list[str]()
        whole: list[str] | None = None
        speaks = False  # the protocol
        for line in self._lines():
            if whole is None and not speaks and line.lstrip().startswith("{"):
                whole = []
            if whole is not None:
                whole.append(line)
                continue
            key, _, value = line.partition(":")
            speaks = speaks or (key in ("", "data", "event", "id", "retry") and ":" in line)
            if key == "data":
                data.append(value.removeprefix(" "))
            elif key == "event":
                name = value.strip()
            elif not line:
                if data:
                    yield name, "\n".join(data)
                name, data = "", []
        if whole is not None:
            yield "", "\n".join(whole)
        elif data:  # the empty line behind the last event is missing
            yield name, "\n".join(data)
        elif not speaks:
            raise self._server.no_server()

    def spoke(self) -> None:
        """Text has come: from now on silence is a fault sooner."""
        self._text_at, self._patience = time.monotonic(), IDLE_SECONDS

    def close(self) -> None:
        """Hang up, so that the server stops computing."""
        self._stop.set()
        if self._response is not None:
            stream = self._response.extensions.get("network_stream")
            connection = stream.get_extra_info("socket") if stream is not None else None
            if connection is not None:  # wakes the thread that reads from it; closing alone would not
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def _deadline(self) -> float:
        """When silence becomes a fault: signs of life put it off, but not for ever without any text."""
        return min(self._heard_at + self._patience, self._text_at + SIGNS * self._patience)

    def _lines(self) -> Iterator[str]:
        """The lines of the body, each as soon as it is whole; the last one even without its end."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        held = ""
        while (part := self._next(self._deadline)) is not None:
            assert isinstance(part, bytes)
            try:
                held += decoder.decode(part)
            except UnicodeDecodeError:
                raise OneReply(f"{self._server.host} sent bytes that are not UTF-8", TRY_AGAIN) from None
            # A carriage return at the end may be half of an end of line.
            cut = len(held) - 1 if held.endswith("\r") else len(held)
            *lines, rest = re.split("\r\n|\n|\r", held[:cut])
            held = rest + held[cut:]
            if len(held) > LARGEST_LINE:
                raise OneReply(f"{self._server.host} sent a line without an end", TRY_AGAIN)
            if lines:  # a comment counts: servers send them to say that they are at work
                self._heard_at = time.monotonic()
            yield from lines
        if held:
            yield held.removesuffix("\r")

    def _read(self, method: str, url: str, content: dict[str, Any] | None) -> None:
        headers = {"accept-encoding": "identity", "user-agent": "dbrx"}
        if self._server.key:
            headers["authorization"] = f"Bearer {self._server.key}"
        body = None if content is None else json.dumps(content).encode()
        if body is not None:
            headers["content-type"] = "application/json"
        timeout = httpx2.Timeout(FIRST_SECONDS + IDLE_SECONDS, connect=CONNECT_SECONDS)
        proxies = not is_loopback(urlsplit(url).hostname or "")  # this machine is never asked through one
        try:
            with (
                httpx2.Client(timeout=timeout, trust_env=proxies, verify=_trusted(url)) as client,
                client.stream(
                    method, url, content=body, headers=headers, extensions={"trace": self._note_step}
                ) as response,
            ):
                self._response = response
                self._arrived.put(response)
                for part in response.iter_bytes():
                    if self._stop.is_set():
                        break
                    self._arrived.put(part)
            self._arrived.put(None)
        except Exception as error:  # told by the one who waits
            self._arrived.put(error)

    def _note_step(self, name: str, found: dict[str, Any]) -> None:
        self._step, self._head_at = name, None
        if name in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            stream = found["return_value"]
            stream.read = functools.partial(self._noted, stream.read)

    def _noted(self, read: Callable[..., bytes], *args: Any, **options: Any) -> bytes:
        """What the connection reads; no step of the transport says when a head begins, only when it is whole."""
        part = read(*args, **options)
        if self._head_at is None and self._step.endswith("receive_response_headers.started"):
            self._head_at = time.monotonic()
        return part

    def _next(self, deadline: float) -> httpx2.Response | bytes | None:
        while True:
            begun = self._head_at
            end = deadline if begun is None else min(deadline, begun + HEAD_SECONDS)
            left = end - time.monotonic()
            with contextlib.suppress(queue.Empty):
                arrived = self._arrived.get(timeout=max(0.0, min(left, POLL_SECONDS)))
                break
            if left <= 0:
                what = "nothing for too long" if begun is None else "the head of its answer too slowly"
                raise ConnectionFault(f"{self._server.host} sent {what}", TRY_AGAIN)
        if isinstance(arrived, DbrxError):
            raise arrived
        if isinstance(arrived, Exception):
            raise self._fault(arrived) from None
        return arrived

    def _head(self, deadline: float) -> None:
        response = self._next(deadline)
        assert isinstance(response, httpx2.Response)
        if response.status_code == 200:
            self._heard_at = time.monotonic()
            return
        body = b""
        with contextlib.suppress(ConnectionFault):
            for part in self._rest(min(deadline, time.monotonic() + CONNECT_SECONDS)):
                body += part
        if 300 <= response.status_code < 400:
            place = self._server.said(response.headers.get("location", "another place"))
            raise NoPath(f"{self._server.host} redirects to {place}", "if you trust it, give that address to --url")
        fault = self._server.refusal(response.status_code, _message(body), self._method == "POST")
        if isinstance(fault, Passing):
            with contextlib.suppress(ValueError):  # it may be a date as well
                fault.seconds = max(0.0, float(response.headers.get("retry-after", "")))
                fault.message += f" and asks to wait {fault.seconds:.0f} seconds"
        raise fault

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
        causes = list(_causes(error))
        untrusted = next((cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)), None)
        if untrusted is not None:
            return ConnectionFault(
                f"the certificate of {host} is not trusted ({untrusted.verify_message.rstrip('.')})",
                "set SSL_CERT_FILE to the certificate of who signed it, if you trust that",
            )
        if self._step.endswith("start_tls.failed"):
            reason = next((cause.reason for cause in causes if isinstance(cause, ssl.SSLError)), None)
            why = f" ({reason.replace('_', ' ').lower()})" if reason else ""
            return ConnectionFault(f"{host} does not answer in TLS{why}", "check --url: is it http://?")
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            return ConnectionFault(f"{host} cannot be reached", "check --url and that the server runs")
        if isinstance(error, httpx2.TimeoutException):
            return ConnectionFault(f"{host} stopped answering", TRY_AGAIN)
        if isinstance(error, httpx2.HTTPError):
            plain = self._response is None and self._server.bases[0].startswith("http:")
            return OneReply(f"{host} broke off the connection", TRY_AGAIN + (" (or is it https://?)" if plain else ""))
        return ConnectionFault(f"{host} cannot be asked ({type(error).__name__})", "check --url")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _trusted(url: str) -> ssl.SSLContext:
    """Whose certificates are trusted: SSL_CERT_FILE's, SSL_CERT_DIR's, else the system's; on this machine too."""
    if not url.startswith("https:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # is not used, and trusts nobody
    return _read_trusted(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=1)  # it takes a while, and a batch asks often
def _read_trusted(file: str | None, folder: str | None) -> ssl.SSLContext:
    try:
        return httpx2.create_ssl_context()  # looks at both variables itself
    except OSError as error:
        which, path = ("SSL_CERT_FILE", file) if file else ("SSL_CERT_DIR", folder)
        raise InputError(f"{which} {path!r} cannot be read: {error.strerror or error}", f"set {which} again") from None


def _message(body: bytes) -> str:
    """What an error's body says, or its first words."""
    text = body[:65536].decode("utf-8-sig", "replace")
    try:
        return words_of(parse(text.encode()))
    except ValueError:
        return "" if text.lstrip().startswith("<") else text


def persist(
    attempt: Callable[[], T],
    notice: Callable[[str], None],
    stop: threading.Event,
    seconds: float | None = None,
    tries: int | None = None,
) -> T:
    """What an attempt gives: made again while its fault is a `Passing` one, as long as `patience` has it.

    seconds, tries: other bounds than the usual ones.
    """

    def once() -> T:
        try:
            return attempt()
        except Passing as fault:
            raise Transient(fault, pause=fault.seconds, tries=tries or fault.tries) from None

    return RetryPolicy(stop, seconds, lambda fault: notice(f"{fault.message}: it is asked again")).persist(once)


def words_of(error: Any) -> str:
    """What an error says in OpenAI's form, FastAPI's (a list of faults, each with its place), or another one."""
    if isinstance(error, list):
        return "; ".join(words_of(part) for part in error[:5])
    if isinstance(error, dict):
        if isinstance(error.get("msg"), str):
            place = error.get("loc")
            return ".".join(map(str, place)) + f": {error['msg']}" if isinstance(place, list) else error["msg"]
        for key in ("error", "detail", "message", "errors"):
            if error.get(key):
                return words_of(error[key])
    return error if isinstance(error, str) else json.dumps(error)
