"""What routes ask for: places in the queue, tickets that are computed, replies that come. All in HTTP's thread."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dbrx_cli.engine import Done, Request
from dbrx_cli.engine.job import Job
from dbrx_cli.server.errors import ApiError, of_request
from dbrx_cli.server.metrics import Metrics
from dbrx_cli.server.tickets import Mailbox, OverTime, Ticket
from dbrx_cli.server.timelines import Timelines
from dbrx_cli.server.worker import Talk, Worker
from model.errors import DbrxError
from model.messages import Message

if TYPE_CHECKING:
    from dbrx_cli.engine.local import LocalEngine

PREPARING = 4  # threads that encode prompts and compile schemas: a slow one holds up none of the others


@dataclass(frozen=True)
class Limits:
    """What a server takes."""

    rows: int = 8  # replies at once
    queue: int = 64  # that wait beside these
    seconds: float = 3600.0  # from a request to the end of its reply


class Service:
    """One model and its clients."""

    def __init__(self, load: Callable[[], LocalEngine], names: Sequence[str], limits: Limits) -> None:
        """names: of the model, the one that is listed first. Make it inside a running event loop."""
        self.names, self.limits = names, limits
        self.worker = Worker(load, limits.rows, asyncio.get_running_loop(), self._remember, self._foresee)
        self.metrics = Metrics(self.worker)
        self.created = int(time.time())
        self.draining = False
        self.last_used = time.monotonic()
        self.open = 0  # choices that are asked for and have not ended
        self._timelines: Timelines | None = None
        self._preparing = ThreadPoolExecutor(PREPARING, "prepare")

    @property
    def engine(self) -> LocalEngine:
        """The loaded model; `ApiError` while there is none."""
        if self.worker.engine is None or not self.worker.ready.is_set():
            raise ApiError("the model is being loaded", 503, code="loading", headers={"retry-after": "5"})
        return self.worker.engine

    def named(self, name: str | None) -> str:
        """The listed name of the model that a request names; `ApiError` if it is another one."""
        if name is not None and name not in self.names:
            told = f"the model {name[:200]!r} is not served here: {self.names[0]} is"
            raise ApiError(told, 404, param="model", code="model_not_found")
        return self.names[0]

    @asynccontextmanager
    async def tickets(self, requests: Sequence[Request], mailbox: Mailbox, param: str) -> AsyncIterator[list[Ticket]]:
        """Tickets under way. Those that have no result at the end are cancelled."""
        self._admit(len(requests), param)
        self.open += len(requests)
        tickets = [Ticket(request, i, mailbox) for i, request in enumerate(requests)]
        loop = asyncio.get_running_loop()
        limit = loop.call_later(self.limits.seconds, mailbox.wake, OverTime())
        added: list[Ticket] = []
        try:
            for ticket in tickets:
                ticket.job = await loop.run_in_executor(self._preparing, self._job, ticket.request, param)
            for ticket in tickets:
                ticket.added = time.monotonic()
                self.worker.add(ticket)
                added.append(ticket)
            yield tickets
        finally:
            limit.cancel()
            for ticket in added:
                if not ticket.ended:
                    self.worker.cancel(ticket)
            self.open -= len(requests)
            self.last_used = time.monotonic()

    def _job(self, request: Request, param: str) -> Job:
        engine = self.engine
        ids = request.prompt_ids or ()
        size = engine.network.config.vocab_size
        for at, given in ((param, ids), ("logit_bias", request.logit_bias)):
            if wrong := [token for token in given if token >= size]:
                raise ApiError(f"{wrong[0]} is no id of a token: there are {size}", param=at)
        try:
            return Job(engine, self._with_known_ids(request))
        except DbrxError as fault:
            raise of_request(fault, param) from None

    def _with_known_ids(self, request: Request) -> Request:
        """The same with the ids that were sampled, where the conversation goes on from what was made here."""
        talk = request.prompt
        if isinstance(talk, str) or self._timelines is None:
            return request
        if not request.continue_final:
            return replace(request, prompt_ids=self._timelines.encode(talk))
        if (found := self._timelines.reply(talk)) is None:
            return request
        prompt, reply = found
        return replace(request, prompt=[*talk[:-1], replace(talk[-1], token_ids=tuple(reply))], prompt_ids=prompt)

    def _remember(self, ticket: Ticket, done: Done) -> Talk | None:
        """Keep the ids of a conversation whose reply is complete, unless a stop string or a limit cut one in two."""
        prompt, reply, tokenizer = ticket.request.prompt, ticket.job.reply, self.engine.tokenizer
        if isinstance(prompt, str):
            return None
        self._timelines = self._timelines or Timelines(tokenizer)
        made = done.token_ids
        ended = bool(made) and made[-1] in tokenizer.eos_token_ids
        if tokenizer.decode(made[: len(made) - ended], skip_special_tokens=True) != done.text:
            return None
        said = prompt[:-1] if ticket.request.continue_final else prompt
        talk = [*said, Message("assistant", reply.text)]
        self._timelines.keep(talk, reply.prompt, reply.ids[: len(reply.ids) - ended])
        return talk

    def _foresee(self, talk: Talk) -> list[int]:
        return [] if self._timelines is None else self._timelines.foresee(talk)

    def _admit(self, count: int, param: str) -> None:
        most = self.limits.rows + self.limits.queue
        if count > most:  # and would be for ever
            raise ApiError(f"{count} replies are more than the {most} that may be made and waited for", param=param)
        if self.draining:
            raise ApiError("the server is about to end", 503, code="draining", headers={"connection": "close"})
        if self.open + count > most:
            seconds = max(1, math.ceil(self.worker.seconds_to_place()))
            told = f"{self.open} replies are made or waited for, and no more are taken; try again in {seconds} s"
            raise ApiError(told, 429, code="queue_full", headers={"retry-after": str(seconds)})

    def close(self) -> None:
        """End the threads."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self.worker.stop()
