"""The life of a server: listen, load, answer, and end when a signal says so or nobody has asked for long."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp, Scope

from dbrx_cli import early, output
from dbrx_cli.running import Record, recorded
from dbrx_cli.server.app import create_app
from dbrx_cli.server.safety import Guard
from dbrx_cli.server.service import Limits, Service

if TYPE_CHECKING:
    from dbrx_cli.engine.local import LocalEngine
    from dbrx_cli.report import Report

LOOK_SECONDS = 0.5  # how often it is seen whether the time is over


@dataclass(frozen=True)
class Ends:
    """How long a server goes on."""

    drain_seconds: float  # in which replies may still end
    idle_seconds: float | None  # without a request, after which it ends


def url_of(host: str, port: int) -> str:
    """How others on this machine reach it."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"


def serve(
    load: Callable[[], LocalEngine], record: Record, aliases: Sequence[str], ends: Ends,
    listening: socket.socket, limits: Limits, guard: Guard, report: Report,
) -> int:  # fmt: skip
    """Serve until the end; the exit code. The fault of loading is raised. record: what others find meanwhile."""
    return asyncio.run(_Life(load, record, aliases, ends, limits, guard, report).run(listening))


class HttpServer(uvicorn.Server):
    """uvicorn's, which leaves signals to `_Life`. It logs no requests."""

    def __init__(self, app: Callable[[Callable[[Scope], None]], ASGIApp], drain_seconds: float) -> None:
        """app: makes the application, of what cuts the connection of a request."""
        config = uvicorn.Config(
            app(self.cut), http="h11", ws="none", lifespan="off", log_config=None, log_level="error", access_log=False,
            server_header=False, timeout_graceful_shutdown=int(drain_seconds),
        )  # fmt: skip
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def cut(self, scope: Scope) -> None:
        """Break off the connection of a request. Closing it would wait until the client has taken all."""
        for connection in self.server_state.connections:
            if getattr(connection, "scope", None) is scope:
                connection.transport.abort()


class _Life:
    def __init__(
        self, load: Callable[[], LocalEngine], record: Record, aliases: Sequence[str], ends: Ends, limits: Limits,
        guard: Guard, report: Report,
    ) -> None:  # fmt: skip
        self._load, self._record, self._names = load, record, [record.name, *aliases]
        self._limits, self._guard, self._ends, self._report = limits, guard, ends, report
        self._code = 0

    async def run(self, listening: socket.socket) -> int:
        self._service = service = Service(self._load, self._names, self._limits)
        self._server = HttpServer(partial(create_app, service, self._guard), self._ends.drain_seconds)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, number)
        await asyncio.sleep(0)  # a Ctrl-C from before these ends it here: no thread shows yet that it loads
        service.worker.start()
        serving = asyncio.create_task(self._server.serve([listening]))
        try:
            await self._until_loaded(serving)
            if service.worker.fault is None:
                with recorded(self._record):
                    self._report.notice(f"{self._names[0]} is served at {self._record.url}/v1; Ctrl-C ends it")
                    await self._until_idle(serving)
                    self._server.should_exit = True
                    await serving
        finally:
            self._server.should_exit = True
            await serving
            service.close()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        if service.worker.fault is not None:
            raise service.worker.fault
        if service.worker.engine is not None:
            await asyncio.to_thread(service.worker.thread.join)
        return self._code

    async def _until_loaded(self, serving: asyncio.Task[None]) -> None:
        loading = asyncio.create_task(self._service.worker.ready.wait())
        await asyncio.wait({loading, serving}, return_when=asyncio.FIRST_COMPLETED)
        loading.cancel()

    async def _until_idle(self, serving: asyncio.Task[None]) -> None:
        """Return when the server ends, which it does by itself when nobody has asked for long."""
        while not serving.done():
            await asyncio.wait({serving}, timeout=LOOK_SECONDS)
            idle = time.monotonic() - self._service.last_used
            if self._ends.idle_seconds is not None and not self._service.open and idle > self._ends.idle_seconds:
                self._report.notice(f"nobody has asked for {self._ends.idle_seconds:g} s: the server ends")
                self._server.should_exit = True
                return

    def _end(self, number: int) -> None:
        """At the first signal take no more requests and let replies end; at the second, or while loading, end."""
        code = early.INTERRUPTED if number == signal.SIGINT else 0
        ends = self._service.draining or self._service.worker.engine is None
        output.restore(last=ends)  # the terminal has shown ^C
        if ends:
            os._exit(code or 128 + number)
        self._service.draining, self._server.should_exit, self._code = True, True, code
        if self._service.open:
            self._report.notice(f"replies on their way: {self._service.open}; Ctrl-C again ends them at once")
