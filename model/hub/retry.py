"""How long a piece of work on a bad network goes on: retries with backoff, and an end when nothing moves.

One rule for all that waits for others, the Hub or a server of `--url`: docs/servers.md has it in words.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..errors import ConnectionFault, DbrxError

T = TypeVar("T")

STALL_SECONDS = 22.0  # without progress; with the program's start and the last attempt the end comes within 30 s
LEAST_PROGRESS = 32 * 1024  # bytes that count as progress: a drip of a byte a second is a stall
CRAWL_SECONDS = 8.0  # without progress on one connection: another one may do better
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 8.0
FEW_TRIES = 4  # where no more would help: a host that cannot be connected to most likely has no network before it
OVERDUE_SECONDS = 2.0  # grace for an attempt that hangs where no timeout of a single read ends it
POLL_SECONDS = 0.05
FAREWELL_SECONDS = 0.5  # how long workers may take to notice that they should stop

AGAIN = "run the same command again: it continues where this one stopped"


class Transient(Exception):
    """A fault that another attempt may cure; `fault` is what the user reads if none does."""

    def __init__(
        self, fault: DbrxError, *, pause: float | None = None, tries: int | None = None, restart: bool = False
    ) -> None:
        super().__init__(fault.message)
        self.fault = fault
        self.pause = pause  # seconds that the server asked to wait
        self.tries = tries  # after how many it is given up, if time does not end it before
        self.restart = restart  # what was received so far cannot be continued


class Stopped(Exception):
    """Another worker failed, or the user pressed Ctrl-C."""


class RetryPolicy:
    """The clock of one piece of work; it starts again whenever enough bytes beyond the furthest point arrived."""

    def __init__(
        self,
        stop: threading.Event,
        seconds: float | None = None,
        waits: Callable[[DbrxError], None] = lambda fault: None,
    ) -> None:
        """seconds: STALL_SECONDS, or how long it may go on without progress. waits: hears of the first fault that
        another attempt may cure.
        """
        self._stop = stop
        self._seconds = seconds
        self._waits = waits
        self._furthest = 0
        self.restart()

    def restart(self, offset: int = 0) -> None:
        """Begin to wait from now, with `offset` bytes on disk."""
        self._furthest = max(self._furthest, offset)
        self._since = self._attempt = time.monotonic()
        self._failures = 0

    def reached(self, offset: int) -> None:
        """Note how far the work is; raises `Stopped`, or `Transient` when this attempt crawls."""
        self.check_stop()
        if offset - self._furthest >= LEAST_PROGRESS:
            self.restart(offset)
        elif time.monotonic() - max(self._since, self._attempt) > CRAWL_SECONDS:
            raise Transient(ConnectionFault("the server sent next to nothing", AGAIN))

    def check_stop(self) -> None:
        """Raise `Stopped` if the work is to end."""
        if self._stop.is_set():
            raise Stopped

    @property
    def left(self) -> float:
        """Seconds until the work is given up."""
        return self._since + (STALL_SECONDS if self._seconds is None else self._seconds) - time.monotonic()

    def pause(self, transient: Transient) -> None:
        """Wait before the next attempt, or raise the fault if there is no time for one."""
        seconds = max(transient.pause or 0.0, FIRST_PAUSE)  # one that asks for no pause gets one
        if transient.pause is None:
            seconds = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._failures)
        self._failures += 1
        if seconds > self.left or (transient.tries is not None and self._failures >= transient.tries):
            raise transient.fault
        if self._failures == 1:
            self._waits(transient.fault)
        if self._stop.wait(seconds):
            raise Stopped
        self._attempt = time.monotonic()

    def persist(self, attempt: Callable[[], T]) -> T:
        """Repeat `attempt` until it returns, fails for good, or the policy gives it up."""
        while True:
            try:
                return attempt()
            except Transient as transient:
                self.pause(transient)


def run(
    jobs: Sequence[Callable[[RetryPolicy], None]], workers: int = 1, tick: Callable[[], None] = lambda: None
) -> None:
    """Do all jobs in `workers` threads; `tick` is called from the calling thread meanwhile.

    The first fault stops the others and is raised. The threads are daemons that the caller watches: Ctrl-C ends the
    wait at once even if a worker hangs in a system call, and so does a worker whose policy ended long ago.
    """
    stop, finished = threading.Event(), threading.Semaphore(0)
    waiting: queue.SimpleQueue[Callable[[RetryPolicy], None]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    busy: dict[int, RetryPolicy] = {}
    faults: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                policy = busy[threading.get_ident()] = RetryPolicy(stop)
                waiting.get_nowait()(policy)
        except (queue.Empty, Stopped):
            pass
        except BaseException as fault:
            faults.append(fault)
        finally:
            busy.pop(threading.get_ident(), None)
            finished.release()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)))]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running and not faults:
            running -= finished.acquire(timeout=POLL_SECONDS)
            tick()
            if any(policy.left < -OVERDUE_SECONDS for policy in list(busy.values())):
                raise ConnectionFault(f"the server sent nothing useful for {STALL_SECONDS:.0f} seconds", AGAIN)
    finally:
        stop.set()
        end = time.monotonic() + FAREWELL_SECONDS
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))
    if faults:
        raise faults[0]
