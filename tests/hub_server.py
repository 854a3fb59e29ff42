"""A local Hugging Face Hub with faults: the endpoint on one port, its storage for large files on another."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

ALWAYS = 1_000_000
PIECE = 16 * 1024


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a kind.

    `target`: revision, tree, file (the Hub's answer for a file) or bytes (the body, wherever it comes from).
    `at`: offset in the file from which on it goes wrong. `path`: only for this file.
    """

    kind: str
    target: str = "bytes"
    at: int = 0
    times: int = 1
    path: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """One request."""

    server: str  # hub, storage, or other: the hub under another host name
    method: str
    path: str
    authorization: str | None
    range: str | None


@dataclass
class Repo:
    """Commits (sha -> path -> bytes), refs (name -> sha), and the faults that requests for it meet."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, target: str, path: str | None, start: int = 0) -> Fault | None:
        """The fault that this request meets, used up by one."""
        with self.lock:
            for fault in self.faults:
                fits = fault.target == target and fault.path in (None, path) and fault.times > 0
                if fits and (target != "bytes" or fault.at >= start or fault.kind in WHOLE_ANSWER | CUTS):
                    fault.times -= 1
                    return fault
        return None


CUTS = {"close", "reset", "stall", "drip", "no length"}
WHOLE_ANSWER = {"status", "silence", "garbage", "header drip", "no range", "wrong range", "html", "hang up", "loop"}


def git_id(content: bytes) -> str:
    """The id that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    """Whether the Hub keeps a file in its storage for large files."""
    return path.endswith((".safetensors", ".bin"))


class FakeHub:
    """Two servers, what they hold, and what they saw."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        self.bytes_sent = 0  # of file bodies
        self.pace = 0.0  # seconds of rest after each piece of a body
        self.page_size = 1000
        self.redirect_to: str | None = None  # origin that large files are redirected to, instead of the storage
        self.pages_from: str | None = None  # origin of the next page of a listing
        self.watch: Callable[[int], None] | None = None  # called with bytes_sent after each piece
        self.alter: Callable[[Any], Any] | None = None  # what the API says -> what it says wrongly
        self._lock = threading.Lock()
        self._servers = [_Server(self, "hub"), _Server(self, "storage")]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def add(self, name: str, files: dict[str, bytes], revision: str = "main") -> str:
        """A new commit of a repository, and the branch that points to it; returns its sha."""
        content = json.dumps({path: git_id(data) for path, data in sorted(files.items())})
        commit = hashlib.sha1(f"{name} {content}".encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo({}, {}))
        repo.commits[commit] = files
        repo.refs[revision] = commit
        return commit

    def authorized(self, server: str) -> set[str | None]:
        """Authorization headers that a server saw."""
        return {seen.authorization for seen in self.seen if seen.server == server} - {None}

    def count(self, n: int) -> None:
        with self._lock:
            self.bytes_sent += n
        if self.watch is not None:
            self.watch(self.bytes_sent)

    def __enter__(self) -> FakeHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    send_buffer = 64 * 1024  # small, so that bytes_sent is what clients received, or nearly

    def __init__(self, hub: FakeHub, role: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_buffer)
        self.hub, self.role = hub, role

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub, headers = self.server.hub, self.headers
        role = self.server.role if headers.get("host", "").startswith("127.0.0.1:") else "other"
        seen = Seen(role, self.command, self.path, headers.get("authorization"), headers.get("range"))
        hub.seen.append(seen)
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "blob":
            return self._blob("/".join(parts[1:3]), parts[3], "/".join(parts[4:]))
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._api("/".join(parts[2:4]), parts[4:])
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self._error(404, "")

    def _api(self, name: str, rest: list[str]) -> None:
        repo = self.server.hub.repos.get(name)
        if repo is None:
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        target = rest[0] if rest else "revision"
        if (fault := repo.take(target, None)) and not self._fault(fault):
            return None
        if target == "refs":
            refs = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha} for ref, sha in repo.refs.items()]
            return self._json({"branches": refs, "tags": [], "converts": []})
        revision = "/".join(rest[1:]) or "main"
        commit = revision if revision in repo.commits else repo.refs.get(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if target == "revision":
            return self._json({"id": name, "modelId": name, "sha": commit, "siblings": [], "tags": []})
        return self._tree(repo.commits[commit])

    def _tree(self, files: dict[str, bytes]) -> None:
        size = self.server.hub.page_size
        query = dict(part.partition("=")[::2] for part in urlsplit(self.path).query.split("&"))
        first = int(query.get("cursor", "0"))
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "folder", "oid": "0" * 40, "size": 0}]
        for path, content in list(files.items())[first : first + size]:
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
            if is_large(path):
                digest = hashlib.sha256(content).hexdigest()
                entry["oid"] = git_id(digest.encode())
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        headers = {}
        if first + size < len(files):
            path = self.path.split("?")[0]
            origin = self.server.hub.pages_from or self.server.hub.endpoint
            headers["Link"] = f'<{origin}{path}?recursive=true&cursor={first + size}>; rel="next"'
        self._json(entries, headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.server.hub.repos.get(name)
        if repo is None:
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        if (fault := repo.take("file", path)) and not self._fault(fault):
            return None
        commit = revision if revision in repo.commits else repo.refs.get(revision)
        content = repo.commits[commit].get(path) if commit else None
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": str(commit)}
        if not is_large(path):
            return self._body(repo, path, content, headers | {"ETag": f'"{git_id(content)}"'})
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["X-Linked-Size"] = str(len(content))
        origin = self.server.hub.redirect_to or self.server.hub.storage
        headers["Location"] = f"{origin}/blob/{name}/{commit}/{path}?signature=s"
        self._answer(302, b"", headers)

    def _blob(self, name: str, commit: str, path: str) -> None:
        repo = self.server.hub.repos[name]
        self._body(repo, path, repo.commits[commit][path], {})

    def _body(self, repo: Repo, path: str, content: bytes, headers: dict[str, str]) -> None:
        start = int(self.headers["range"][6:].partition("-")[0]) if self.headers.get("range") else 0
        fault = repo.take("bytes", path, start) if self.command == "GET" else None
        if fault and fault.kind in WHOLE_ANSWER and fault.kind not in ("no range", "wrong range"):
            self._fault(fault)
            return
        kind = fault.kind if fault else ""
        if start and start >= len(content):
            return self._error(416, "")
        if kind == "no range":
            start = 0
        status, size = (206 if start else 200), len(content)
        if kind in ("short", "long"):
            content = content[: fault.at] if fault and kind == "short" else content + b"x" * 1000
        if start:
            first = start - 7 if kind == "wrong range" else start
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if kind == "no length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self._stream(content, start, fault)

    def _stream(self, content: bytes, start: int, fault: Fault | None) -> None:
        hub, kind, at = self.server.hub, fault.kind if fault else "", fault.at if fault else 0
        if kind == "flip":
            content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        stops = kind in CUTS
        end, position = min(max(at, start), len(content)) if stops else len(content), start
        while position < end:
            piece = content[position : min(position + PIECE, end)]
            self.wfile.write(piece)
            position += len(piece)
            hub.count(len(piece))
            if hub.pace:
                time.sleep(hub.pace)
        if kind == "drip":
            for offset in range(end, len(content)):
                self.wfile.write(content[offset : offset + 1])
                self.wfile.flush()
                time.sleep(0.05)
        if stops:
            self._break_off(kind)

    def _fault(self, fault: Fault) -> bool:
        """Act out a fault of a whole answer; True if the normal answer should follow."""
        if fault.kind == "status":
            self._error(fault.at, fault.headers.get("X-Error-Code", ""), headers=fault.headers)
        elif fault.kind == "loop":
            self._answer(302, b"", {"Location": f"{self.server.hub.endpoint}{self.path}"})
        elif fault.kind == "html":
            self._answer(200, b"<html>Please log in to this network</html>", {"Content-Type": "text/html"})
        elif fault.kind == "header drip":
            for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 12:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
            self._break_off("close")
        elif fault.kind == "garbage":
            self.wfile.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
            self._break_off("close")
        elif fault.kind == "silence":
            self._break_off("stall")
        elif fault.kind == "hang up":
            self._break_off("reset")
        else:
            raise ValueError(fault.kind)
        return False

    def _break_off(self, how: str) -> None:
        self.wfile.flush()
        self.close_connection = True
        if how == "stall":
            self.connection.settimeout(20)
            with suppress(OSError):
                self.connection.recv(1)  # until the client gives up
        if how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        if self.server.hub.alter is not None:
            value = self.server.hub.alter(value)
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _error(self, status: int, code: str, message: str = "", headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Code": code} if code else {}
        extra |= {"X-Error-Message": message} if message else {}
        self._answer(status, b"", extra | (headers or {}))

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running Hub."""
    with FakeHub() as hub:
        yield hub


def checkpoint(seed: int = 0, shards: int = 3, shard_bytes: int = 100_000) -> dict[str, bytes]:
    """Files like a DBRX checkpoint's, the shards filled with bytes that depend on the seed; code and pickles beside."""
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files = {
        "config.json": json.dumps({"model_type": "dbrx", "seed": seed}).encode(),
        "model.safetensors.index.json": json.dumps(
            {"metadata": {}, "weight_map": {f"tensor.{i}": name for i, name in enumerate(names)}}
        ).encode(),
        "tokenizer_config.json": b"{}",
        "README.md": b"# A model\n",
        "modeling_dbrx.py": b"print('never fetched')\n",
        "pytorch_model.bin": b"\x80\x04never fetched",
    }
    for i, name in enumerate(names):
        stream = hashlib.shake_256(f"{seed} {i}".encode())
        files[name] = stream.digest(shard_bytes)
    return files
