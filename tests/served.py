"""A server of `dbrx serve` in a thread of the tests' own process: real sockets, no start of torch."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx2
import pytest

from dbrx_cli.addresses import listen
from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.server.app import create_app
from dbrx_cli.server.run import HttpServer
from dbrx_cli.server.safety import Guard
from dbrx_cli.server.service import Limits, Service


class Served:
    """A context manager. `url` ends in /v1."""

    def __init__(
        self,
        load: Callable[[], LocalEngine],
        limits: Limits = Limits(),  # noqa: B008
        key: str | None = None,
        origins: tuple[str, ...] = (),
    ) -> None:
        self._load, self._limits, self._guard = load, limits, Guard("127.0.0.1", key, origins)
        self.listening = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}/v1"
        self._ready = threading.Event()
        self.service: Service
        self.waits = True  # until the model is loaded
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        headers = {"authorization": f"Bearer {key}"} if key else {}
        # To read the certificates that plain HTTP does not need would take longer than most requests.
        self.client = httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, verify=False)

    async def _run(self) -> None:
        self.service = service = Service(self._load, ["small", "other-name"], self._limits)
        self._server = HttpServer(partial(create_app, service, self._guard), 60)
        service.worker.start()
        if self.waits:
            await service.worker.ready.wait()
        self._ready.set()
        await self._server.serve([self.listening])
        service.close()
        await asyncio.to_thread(service.worker.thread.join)

    def __enter__(self) -> Served:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join()
        self.listening.close()

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Meanwhile rows come and leave, and no step is made."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.service.worker, "_step", lambda: time.sleep(0.002))
            yield

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.client.post(path, json=body)

    def chat(self, content: str, **body: Any) -> dict[str, Any]:
        """A greedy reply to one message."""
        messages = [{"role": "user", "content": content}]
        answer = self.post("chat/completions", **({"messages": messages, "temperature": 0, "max_tokens": 12} | body))
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def stream(self, path: str, **body: Any) -> Iterator[dict[str, Any] | str]:
        """The events of a stream, its comments, and [DONE]."""
        with self.client.stream("POST", path, json={"stream": True} | body) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))
                elif line:
                    yield line.removeprefix("data: ")


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
