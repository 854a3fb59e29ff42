"""Server-sent events: a reply as it is made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.types import Receive, Scope, Send

from dbrx_cli.server.errors import ApiError
from dbrx_cli.server.tickets import Gone, Mailbox

WRITE_SECONDS = 60.0  # in which a client takes what it was sent
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
]
KEEP_ALIVE = b": keep-alive\n\n"
END = b"data: [DONE]\n\n"


def event(told: dict[str, Any] | None) -> bytes:
    """One event; a comment for None; nothing for an empty one."""
    if told is None:
        return KEEP_ALIVE
    return b"data: " + json.dumps(told, ensure_ascii=False).encode() + b"\n\n" if told else b""


@asynccontextmanager
async def watching(receive: Receive, mailbox: Mailbox) -> AsyncIterator[None]:
    """Wake the mailbox with `Gone` when the client hangs up. The body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        mailbox.wake(Gone())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def send_events(
    chunks: AsyncIterator[dict[str, Any] | None], scope: Scope, send: Send, cut: Callable[[Scope], None]
) -> None:
    """Send chunks and the mark of the end. After a fault an error is the last event, and the mark does not come.

    cut: breaks off the connection of a client that takes nothing any more.
    """

    async def write(body: bytes, more: bool = True) -> None:
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            cut(scope)
            await asyncio.sleep(0)  # until uvicorn knows
            raise Gone from None

    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    try:
        async for chunk in chunks:
            if body := event(chunk):
                await write(body)
        await write(END, more=False)
    except ApiError as fault:
        await write(event(fault.body), more=False)
