"""What signals do to a chat: SIGINT stops what is done, SIGTERM and SIGHUP leave in good order; none loses a turn."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, Self

from dbrx_cli.repl.typeahead import UNMARK, edits_lines

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Signals:
    """They interrupt, as `KeyboardInterrupt`, only inside `heard()`, and otherwise wait for it. A context manager.

    An interrupt is obeyed in peace: until the next `heard()`, further Ctrl-C are taken for the same one. After SIGTERM
    or SIGHUP, leaving the context ends the program with 128 + its number.
    """

    def __init__(self) -> None:
        self.ending: int | None = None  # SIGTERM or SIGHUP, if it came
        self._heard = False
        self._came = False  # one that waits
        self._obeyed = False  # one interrupted, and what follows from it is under way

    def heard(self) -> _Mode:
        """Signals interrupt here, at once if one has waited."""
        return _Mode(self, True)

    def waiting(self) -> _Mode:
        """Signals wait until this is done."""
        return _Mode(self, False)

    def __enter__(self) -> Self:
        self._before = {each: signal.signal(each, self._obey) for each in (signal.SIGINT, *ENDING)}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        if self.ending is not None:
            raise SystemExit(128 + self.ending)

    def _obey(self, number: int, frame: FrameType | None) -> None:
        if number in ENDING:
            if self.ending is not None:
                return  # once is enough: the session is being saved
            self.ending = number
            if number == signal.SIGHUP:
                _silence()
        elif self._obeyed and not self._heard:
            return
        if self._heard:
            self._interrupt()
        self._came = True

    def _switch(self, heard: bool) -> bool:
        before, self._heard = self._heard, heard
        if heard:
            self._obeyed = False
            if self._came:
                self._interrupt()
        return before

    def _interrupt(self) -> None:
        self._heard = self._came = False
        self._obeyed = True
        raise KeyboardInterrupt


class _Mode:
    """No generator: one that an interrupt leaves behind would switch back when nobody expects it."""

    def __init__(self, signals: Signals, heard: bool) -> None:
        self._signals, self._to = signals, heard

    def __enter__(self) -> None:
        self._before = self._signals._switch(self._to)

    def __exit__(self, *_: Any) -> None:
        self._signals._switch(self._before)


def _silence() -> None:
    """The terminal is gone: what is written to it would be a fault."""
    with suppress(OSError, ValueError):  # it is there if only the signal came, and is left as it was found
        if edits_lines():
            os.write(sys.stdout.fileno(), UNMARK)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
