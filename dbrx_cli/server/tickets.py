"""One choice of an answer on its way between two threads: HTTP's, which waits for it, and the one that computes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from dbrx_cli.engine import Delta, Done, Request

if TYPE_CHECKING:
    from dbrx_cli.engine.job import Job

Event = Sequence[Delta] | Done | BaseException
KEEP_ALIVE_SECONDS = 10.0


class Ticket:
    """A choice: its request, its job once that is made, and its result at the end."""

    job: Job
    result: Done

    def __init__(self, request: Request, index: int, mailbox: Mailbox) -> None:
        self.request, self.index, self.mailbox = request, index, mailbox
        self.streams = mailbox.streams
        self.told = 0  # characters
        self.ended = False
        self.came = self.added = time.monotonic()


class Gone(Exception):
    """The client has hung up."""


class OverTime(Exception):
    """The request has taken too long."""


class Mailbox:
    """What comes for all choices of one HTTP request. Filled and emptied in HTTP's thread."""

    def __init__(self, streams: bool) -> None:
        self.streams = streams
        self._queue: asyncio.Queue[tuple[Ticket, Event] | BaseException] = asyncio.Queue()

    def put(self, ticket: Ticket, event: Event) -> None:
        self._queue.put_nowait((ticket, event))

    def wake(self, why: BaseException) -> None:
        """Have this raised by the one who waits."""
        self._queue.put_nowait(why)

    async def events(self, count: int) -> AsyncIterator[tuple[Ticket, Event] | None]:
        """What comes until `count` choices have their result; None where nothing has come for a while.

        A fault of a choice is raised, as is what wakes it.
        """
        while count:
            try:
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                    arrived = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(arrived, BaseException):
                raise arrived
            ticket, event = arrived
            if isinstance(event, Done | BaseException):
                ticket.ended = True
                count -= 1
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Done):
                ticket.result = event
            yield ticket, event
