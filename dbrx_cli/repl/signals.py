"""What signals do to a chat: SIGINT stops a reply, SIGTERM and SIGHUP leave in good order."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def leaving(leave: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGHUP call `leave` with their number, and then act as Ctrl-C does."""

    def obey(number: int, frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)  # once is enough; the session is being saved
        if number == signal.SIGHUP:
            _silence()
        leave(number)
        raise KeyboardInterrupt

    before = {each: signal.signal(each, obey) for each in ENDING}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def one_interrupt() -> Iterator[None]:
    """The first Ctrl-C interrupts; those that come while it is obeyed are not heard."""

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def no_echo() -> Iterator[None]:
    """What is typed while a reply comes is not shown amid it; it waits for the prompt."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError):  # not a terminal
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _silence() -> None:
    """The terminal is gone: what is written to it would be a fault."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
