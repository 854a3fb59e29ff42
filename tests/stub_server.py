"""An OpenAI-compatible server in this process that replies as a test says, right or wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PIECES = ["The sea", " is bl", "ü", "e.\n", "[bold]"]
TEXT = "".join(PIECES)
Send = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Answers /v1/models, and replies as `reply` says; remembers what it was asked.

    `root`: what stands there for /v1. `list_status`: of the answer to /models, after `list_statuses`, each once. Paths
    under no root are not found.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.models: Any = {"data": [{"id": "dbrx-a", "max_model_len": 4096}, {"id": "dbrx-b"}]}
        self.root, self.list_status = "/v1", 200
        self.list_statuses: list[int] = []
        self.reply: Send = whole
        self.seen: list[tuple[str, str | None, dict[str, Any]]] = []
        self.gone = threading.Event()  # the client hung up
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    asked: dict[str, Any]  # what the request holds

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("authorization"), {}))
        if self.server.list_statuses:
            self.answer(self.server.list_statuses.pop(), {"error": "wait"})
        else:
            there = self.path == f"{self.server.root}/models"
            self.answer(self.server.list_status if there else 404, self.server.models)

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, self.headers.get("authorization"), content))
        self.asked = content
        try:
            if self.path.startswith(f"{self.server.root}/c"):
                self.server.reply(self)
            else:
                self.answer(404, {"detail": "Not Found"})
        except OSError:
            self.server.gone.set()
        self.close_connection = True

    def answer(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def begin(self) -> None:
        """The head of a stream in chunks."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def raw(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def event(self, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.raw(f"data: {text}\n\n".encode())

    def piece(self, text: Any, reason: str | None = None, **more: Any) -> None:
        if self.path.endswith("chat/completions"):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason, **more}
        else:
            choice = {"index": 0, "text": text, "finish_reason": reason, **more}
        self.event({"choices": [choice]})

    def end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def hang(self) -> None:
        """Until the client hangs up."""
        self.connection.settimeout(5)
        if not self.connection.recv(1):
            self.server.gone.set()

    def log_message(self, *args: Any) -> None:
        pass


def pieces(handler: Handler) -> None:
    handler.begin()
    for text in PIECES:
        handler.piece(text)


def whole(handler: Handler) -> None:
    pieces(handler)
    handler.piece("", "stop")
    handler.event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}})
    handler.event("[DONE]")
    handler.end()


def status(code: int, content: Any, **headers: str) -> Send:
    return lambda handler: handler.answer(code, content, **headers)


def chunks(*contents: Any) -> Send:
    """A stream of these events, and its end."""

    def reply(handler: Handler) -> None:
        handler.begin()
        for content in contents:
            handler.event(content)
        handler.end()

    return reply


def choice(content: Any = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk of a chat's reply."""
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": reason, **more}]}


def after_pieces(then: Send) -> Send:
    def reply(handler: Handler) -> None:
        pieces(handler)
        then(handler)

    return reply
