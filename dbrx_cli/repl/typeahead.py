"""What is typed and pasted while no prompt reads: not shown amid a reply, kept for the prompt, dropped by Ctrl-C."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any, Self

from dbrx_cli.output import moves_cursor

PASTE, PASTED = b"\x1b[200~", b"\x1b[201~"  # how a terminal marks what is pasted, if it was asked to
MARK, UNMARK = b"\x1b[?2004h", b"\x1b[?2004l"
SIGNALS = {termios.VINTR: signal.SIGINT, termios.VQUIT: signal.SIGQUIT, termios.VSUSP: signal.SIGTSTP}  # by their keys
QUIET_S, PATIENCE_S = 0.25, 5.0  # for the rest of a paste that is under way


def edits_lines() -> bool:
    """Whether there is a terminal, and it can do more than show lines."""
    return sys.stdin is not None and sys.stdin.isatty() and moves_cursor(sys.stdout)


class Typeahead:
    """A terminal's input from the chat's beginning to its end. A context manager; nothing where stdin is no terminal.

    A thread takes it in, signals as well: the system's own queue holds 4 kB, and a Ctrl-C behind a longer paste would
    not get through; and the thread knows what was typed before it, and what behind.
    """

    def __init__(self) -> None:
        self._lines = not edits_lines()  # then the system's line editing keeps what is typed, and it only is not shown
        self._data = b""
        self._before: list[Any] | None = None  # the terminal's modes, as they were found
        self._marked = False  # pastes are
        self._thread: Thread | None = None

    def __enter__(self) -> Self:
        with suppress(termios.error, OSError, ValueError, TypeError):  # not a terminal
            self._before = termios.tcgetattr(sys.stdin)
        if self._before is not None:
            self._continued = signal.signal(signal.SIGCONT, lambda number, frame: self._again())
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self._stop()
            self._restore()
            signal.signal(signal.SIGCONT, self._continued)

    @contextmanager
    def left_to_prompt(self) -> Iterator[bytes]:
        """The prompt reads, and knows what a paste is; gives what came before, with all of a paste under way."""
        if self._before is None:
            yield b""
            return
        self._stop()
        if self._lines:
            self._restore()
        end = time.monotonic() + PATIENCE_S
        while self._unfinished() and time.monotonic() < end and select.select([sys.stdin], [], [], QUIET_S)[0]:
            self._data += os.read(sys.stdin.fileno(), 65536)
        data, self._data = self._data, b""
        try:
            yield data
        finally:
            self._start()

    @contextmanager
    def left_to_program(self) -> Iterator[None]:
        """Another program has the terminal, as the chat found it."""
        if self._before is None:
            yield
            return
        self._stop()
        self._restore()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        self._set_up()
        if not self._lines:
            self._ended, self._end = os.pipe()
            self._thread = Thread(target=self._collect, daemon=True)
            self._thread.start()

    def _stop(self) -> None:
        if self._thread is not None:
            os.close(self._end)
            self._thread.join()
            self._thread = None
            os.close(self._ended)

    def _collect(self) -> None:
        terminal = sys.stdin.fileno()
        while self._ended not in select.select([self._ended, terminal], [], [])[0]:
            try:
                if os.tcgetpgrp(terminal) != os.getpgrp():  # in the background, where reading would stop the program
                    time.sleep(QUIET_S)
                    continue
                data = os.read(terminal, 65536)
            except OSError:
                data = b""
            if not data:  # the terminal is gone
                return
            self._take_in(data)

    def _take_in(self, data: bytes) -> None:
        """Keep what was typed, and obey the keys that are signals, just where they stand among the others."""
        assert self._before is not None
        keys = self._before[6]
        numbers = {keys[place]: number for place, number in SIGNALS.items() if keys[place] != b"\0"}
        for piece in re.split(b"([%b])" % re.escape(b"".join(numbers)), data):
            if piece not in numbers:
                self._data += piece
                continue
            if numbers[piece] == signal.SIGINT:
                self._data = PASTE if self._unfinished() else b""  # the rest of a paste is no lines
                os.kill(0, signal.SIGINT)  # to all that the terminal itself would tell
            else:
                self._restore()  # what stops or ends the program leaves the terminal to others
                os.kill(0, numbers[piece])
                time.sleep(QUIET_S)  # it takes effect meanwhile; or it is ignored, as without a shell
                self._again()

    def _unfinished(self) -> bool:
        """Whether the end of a paste, or of a character, is missing."""
        try:
            self._data.decode()
        except UnicodeDecodeError as error:
            if error.end == len(self._data) and error.reason == "unexpected end of data":
                return True
        return self._data.rfind(PASTE) > self._data.rfind(PASTED)

    def _set_up(self) -> None:
        assert self._before is not None
        modes = list(self._before)
        modes[3] &= ~termios.ECHO
        if not self._lines:
            modes[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
            modes[3] &= ~(termios.ICANON | termios.IEXTEN | termios.ISIG)
            modes[6] = [*modes[6]]
            modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
            self._mark_pastes(True)
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)

    def _restore(self) -> None:
        if not self._lines:
            self._mark_pastes(False)
        assert self._before is not None
        with suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)

    def _again(self) -> None:
        """After Ctrl-Z and `fg` the modes are the shell's, or those that the chat found."""
        if self._thread is not None:
            self._marked = False
            self._set_up()

    def _mark_pastes(self, wanted: bool) -> None:
        if wanted is not self._marked:
            self._marked = wanted
            with suppress(OSError):
                os.write(sys.stdout.fileno(), MARK if wanted else UNMARK)
