"""The thread that owns the model: it takes requests from an inbox, steps, and hands out what came."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from dbrx_cli.engine import Done
from dbrx_cli.engine.damage import damage_named
from dbrx_cli.engine.memory import memory_fault
from dbrx_cli.output import tell_lines
from dbrx_cli.server.errors import ApiError
from dbrx_cli.server.tickets import Event, Ticket
from model.errors import DbrxError, InputError, ModelError
from model.messages import Message

Talk = list[Message]

if TYPE_CHECKING:
    from dbrx_cli.engine.local import LocalEngine
    from model.kv_pool import PoolStats
    from model.scheduler import Scheduler
    from model.sequence import Sequence

NEWEST = 0.1  # how much the newest step or reply counts in what is expected of the next
STATS_SECONDS = 1.0  # that figures may wait for a step to end
AHEAD_SECONDS = 0.3  # without a request, after which there is time to read ahead: who is quicker would wait for it
MOST_AHEAD = 32  # ids that are read before anybody asks for them: the marks between a reply and what follows


class Pace:
    """What a step takes and how long replies become, as seen so far: to tell when a place will be free."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.reply_tokens = 0.0

    def note_step(self, seconds: float) -> None:
        self.step_s += (seconds - self.step_s) * (NEWEST if self.step_s else 1)

    def note_reply(self, tokens: int) -> None:
        self.reply_tokens += (tokens - self.reply_tokens) * (NEWEST if self.reply_tokens else 1)

    def seconds_left(self, row: Sequence) -> float:
        """Until a row ends: at its limit, or, while it is shorter than replies are, at that length."""
        expected = self.reply_tokens - len(row.ids)
        return min(row.left, expected if expected > 0 else row.left) * self.step_s


class Worker:
    """Runs in a thread of its own from `start` on; `add`, `cancel` and `stop` may be called from another."""

    def __init__(
        self,
        load: Callable[[], LocalEngine],
        rows: int,
        loop: asyncio.AbstractEventLoop,
        remember: Callable[[Ticket, Done], Talk | None],
        foresee: Callable[[Talk], list[int]],
    ) -> None:
        """remember: hears of each reply that is complete, before its client does; the conversation that may go on.

        foresee: the ids of such a conversation, and those that follow whatever is said next.
        """
        self.pace = Pace()
        self.engine: LocalEngine | None = None
        self.fault: BaseException | None = None  # of loading
        self.ready = asyncio.Event()  # loaded, or failed to
        self._load, self._rows, self._loop, self._remember, self._foresee = load, rows, loop, remember, foresee
        self._ended = deque[Talk](maxlen=rows)  # conversations that may go on
        self._inbox: queue.SimpleQueue[Callable[[], bool]] = queue.SimpleQueue()
        self._tickets: dict[Sequence, Ticket] = {}
        self._stats: PoolStats | None = None
        self._scheduler: Scheduler
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def add(self, ticket: Ticket) -> None:
        """Have a ticket with its job computed; what comes is put into its mailbox."""
        self._inbox.put(lambda: self._add(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Have it leave, behind the step that is computed now. Nothing for one that has left."""
        self._inbox.put(lambda: self._cancel(ticket))

    def stop(self) -> None:
        """End the thread behind the step that is computed now."""
        self._inbox.put(lambda: False)

    @property
    def waiting(self) -> int:
        """Rows that have no place yet, or no room for their keys and values."""
        return self._scheduler.waiting if self._tickets else 0

    @property
    def running(self) -> int:
        return max(0, len(self._tickets) - self.waiting)

    async def pool_stats(self) -> PoolStats | None:
        """What the pool holds; the last that was seen if the step that is computed now takes long."""
        if self.engine is not None:
            seen = asyncio.Event()
            self._inbox.put(lambda: self._look_at_pool(seen))
            with suppress(TimeoutError):
                await asyncio.wait_for(seen.wait(), STATS_SECONDS)
        return self._stats

    def _look_at_pool(self, seen: asyncio.Event) -> bool:
        assert self.engine is not None
        self._stats = self.engine.pool.stats()
        self._loop.call_soon_threadsafe(seen.set)
        return True

    def seconds_to_place(self) -> float:
        """When the first of the rows will probably end."""
        return min((self.pace.seconds_left(row) for row in list(self._tickets)), default=0.0)

    def _run(self) -> None:
        try:
            self.engine = self._load()
            self.engine.pool.budget_bytes = self.engine.kv_budget(self._rows)
            self._begin()
            self._time_a_step()
        except BaseException as fault:  # told where the process ends
            self.engine, self.fault = None, fault
        self._loop.call_soon_threadsafe(self.ready.set)
        while self.engine is not None and self._take_in():
            if len(self._scheduler):
                self._step()
            elif self._ended:
                self._read_ahead(self._foresee(self._ended.popleft()))

    def _begin(self) -> None:
        from model.scheduler import Scheduler

        assert self.engine is not None
        self._scheduler = Scheduler(self.engine.network, self._rows, self.engine.pool)

    def _time_a_step(self) -> None:
        """The first who finds no place is told when to come back, too."""
        from model.sampling import SamplingParams
        from model.scheduler import Scheduler
        from model.sequence import Sequence

        assert self.engine is not None
        scheduler = Scheduler(self.engine.network, 1)
        scheduler.add(Sequence([0], SamplingParams(max_tokens=2)))
        scheduler.step()
        begun = time.perf_counter()
        scheduler.step()
        self.pace.note_step(time.perf_counter() - begun)

    def _take_in(self) -> bool:
        """Do what others want; wait for it where there is nothing else to do. False at the end."""
        while True:
            try:
                wanted = self._inbox.get(not len(self._scheduler), AHEAD_SECONDS if self._ended else None)
            except queue.Empty:
                return True
            if not wanted():
                return False

    def _add(self, ticket: Ticket) -> bool:
        try:
            self._scheduler.add(ticket.job.row)
        except DbrxError as fault:  # more keys and values than there is memory for
            ticket.job.close()
            self._post([(ticket, ApiError(fault.message, code="context_length_exceeded"))])
            return True
        self._tickets[ticket.job.row] = ticket
        if ticket.job.row.done:  # it goes on from what was whole already
            self._post(self._end(ticket.job.row))
        return True

    def _cancel(self, ticket: Ticket) -> bool:
        if ticket.job.row in self._tickets:
            self._scheduler.cancel(ticket.job.row)
            self._leave(ticket)
        return True

    def _leave(self, ticket: Ticket) -> None:
        del self._tickets[ticket.job.row]
        ticket.job.close()

    def _step(self) -> None:
        begun, decodes = time.perf_counter(), any(row.ids for row in self._tickets)
        try:
            new = self._scheduler.step()
        except Exception as error:
            self._fail(error)
            return
        if decodes:
            self.pace.note_step(time.perf_counter() - begun)
        letters: list[tuple[Ticket, Event]] = []
        for row in dict.fromkeys(row for row, _ in new):
            ticket = self._tickets[row]
            deltas = list(ticket.job.deltas())
            if ticket.streams and deltas:
                letters.append((ticket, deltas))
        letters += [letter for row in [row for row in self._tickets if row.done] for letter in self._end(row)]
        self._post(letters)

    def _read_ahead(self, ids: list[int]) -> None:
        """While nobody asks, read what will follow a reply, so that a conversation goes on as soon as a new one begins.

        Only the marks: where the conversation has given way to others it is not read again.
        """
        from model.sampling import SamplingParams
        from model.sequence import Sequence

        assert self.engine is not None
        unread = len(ids) - self.engine.pool.find(ids)[0]
        if not 0 < unread <= MOST_AHEAD or len(ids) >= self.engine.context:
            return
        row = Sequence(ids, SamplingParams(max_tokens=1))
        try:
            self._scheduler.add(row)
            self._scheduler.step()
        except DbrxError:
            pass  # there is no room for it
        except Exception as error:
            self._fail(error)
        finally:
            self._scheduler.cancel(row)

    def _end(self, row: Sequence) -> list[tuple[Ticket, Event]]:
        ticket = self._tickets[row]
        job = ticket.job
        try:
            with damage_named(self.engine.source if self.engine else None):
                if row.fault is not None and not (isinstance(row.fault, InputError) and job.reply.ids):
                    raise row.fault
            done = job.done("length" if row.fault else job.finish())
        except DbrxError as fault:
            if isinstance(fault, ModelError):
                tell_lines(f"dbrx: {fault.one_line}")
            return [(ticket, fault)]
        finally:
            self._leave(ticket)
        talk = self._remember(ticket, done)
        if talk is not None and self.engine is not None and self.engine.network.expert_store is None:
            self._ended.append(talk)  # where experts come from a disk, nothing is read that nobody has asked for
        self.pace.note_reply(done.usage.completion_tokens)
        return [(ticket, list(job.deltas())), (ticket, done.error or done)]

    def _fail(self, error: Exception) -> None:
        """Tell all rows the fault of their batch, and begin a new one."""
        assert self.engine is not None
        fault = memory_fault(error, self.engine.network, self._scheduler.cache)
        tell_lines(f"dbrx: {fault.one_line}" if fault else "".join(traceback.format_exception(error)))
        error.__traceback__ = None  # its frames hold memory
        lost = list(self._tickets.values())
        for ticket in lost:
            self._scheduler.cancel(ticket.job.row)
            self._leave(ticket)
        if fault is not None:
            self.engine.pool.clear()
        self._begin()
        self._post([(ticket, fault or RuntimeError(str(error))) for ticket in lost])

    def _post(self, letters: list[tuple[Ticket, Event]]) -> None:
        if letters:
            self._loop.call_soon_threadsafe(_deliver, letters)


def _deliver(letters: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in letters:
        ticket.mailbox.put(ticket, event)
