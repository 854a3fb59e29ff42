"""Many requests to a server at once: it computes them side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

from dbrx_cli.engine import Done, Request
from dbrx_cli.engine.http_client import Forbidden, OneReply
from dbrx_cli.engine.remote import RemoteEngine
from model.errors import AccessError, ConnectionFault, DbrxError, ModelError, ResourceError

PATIENCE = 90.0  # s: a bound of requests a minute is waited for


def at_once(
    engine: RemoteEngine, requests: Iterable[tuple[int, Request]], rows: int
) -> Iterator[tuple[int, Done | DbrxError]]:
    """See `batched.answers`: in `rows` threads, each of which waits for one reply after the other.

    A fault that is raised comes behind the answers that had come before it. When the caller goes (Ctrl-C too), the
    replies that are under way are broken off.
    """
    engine.patience = PATIENCE
    line, lock, stop = iter(requests), Lock(), Event()
    ready: SimpleQueue[tuple[int, Done | Exception] | None] = SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            with lock:
                numbered = next(line, None)
            if numbered is None:
                break
            ready.put((numbered[0], _whole(engine, numbered[1])))
        ready.put(None)

    for _ in range(rows):
        Thread(target=work, daemon=True).start()
    working, answered = rows, False
    try:
        while working:
            found = ready.get()
            if found is None:
                working -= 1
                continue
            number, result = found
            answered = answered or isinstance(result, Done)
            if isinstance(result, Exception) and not (isinstance(result, DbrxError) and _of_one(result, answered)):
                stop.set()
                yield from _arrived(ready)
                raise result
            yield number, result
    finally:
        stop.set()
        engine.close()


def _arrived(ready: SimpleQueue[tuple[int, Done | Exception] | None]) -> Iterator[tuple[int, Done]]:
    """The answers that nobody has taken yet."""
    with contextlib.suppress(Empty):
        while True:
            found = ready.get_nowait()
            if found is not None and isinstance(found[1], Done):
                yield found[0], found[1]


def _whole(engine: RemoteEngine, request: Request) -> Done | Exception:
    """The closing record of a reply, or what kept it from its end."""
    try:
        *_, last = engine.stream(request)
    except Exception as error:  # raised by the one who waits
        return error
    assert isinstance(last, Done)
    return last.error or last


def _of_one(fault: DbrxError, answered: bool) -> bool:
    """Whether a fault is one request's own. One that may be all requests' is not, until another got its answer."""
    if isinstance(fault, Forbidden):
        return answered
    return isinstance(fault, OneReply) or not isinstance(
        fault, AccessError | ConnectionFault | ModelError | ResourceError
    )
