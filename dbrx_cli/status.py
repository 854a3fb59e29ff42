"""A line that says what is waited for and for how long, in its place until text comes."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, RLock, Thread
from typing import Self

from dbrx_cli import output

TICK_S = 0.25
STOPS = "; Ctrl-C stops"


class Status:
    """What is done, what of it is left. A context manager; it shows from its beginning on, `end` wipes it.

    A terminal that cannot move its cursor gets one line that stays, and no terminal gets none (`shown`).
    """

    def __init__(self, doing: str, *, shown: bool = True, speed: float = 0.0) -> None:
        """speed: tokens a second of what was read before, for the time left until this reading tells its own."""
        self._doing, self._speed = doing, speed
        self._shown, self._moves = shown, output.moves_cursor(sys.stderr)
        self._started = self._since = time.monotonic()
        self._read: tuple[int, int] | None = None
        self._made = 0
        self._lock, self._over = RLock(), Event()
        self._thread: Thread | None = None

    def __enter__(self) -> Self:
        if self._shown:
            if not self._moves:
                output.tell(f"dbrx: {self._doing}{STOPS}")
                self._shown = False
                return self
            self._draw()
            output.above.append(self.aside)
            self._thread = Thread(target=self._tick, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def read(self, done: int, total: int) -> None:
        """So many tokens of the prompt are read."""
        self._read = done, total
        if done == 0:
            self._since = time.monotonic()
        self._redraw()

    def made(self) -> None:
        """One more token of a reply that does not show yet."""
        self._made += 1

    def end(self) -> None:
        """Wipe the line; nothing where there is none."""
        if not self._shown:
            return
        self._shown = False
        output.above[:] = [each for each in output.above if each != self.aside]
        self._over.set()
        with self._lock:
            self._wipe()
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Something else is printed, in the line's place; the line comes again below it."""
        with self._lock:
            self._wipe()
            try:
                yield
            finally:
                if self._shown:
                    self._draw()

    def text(self, width: int) -> str:
        """The longest wording that fits."""
        for line in self._wordings():
            if len(line) <= width:
                return line
        return line[:width]

    def _wordings(self) -> list[str]:
        elapsed = time.monotonic() - self._started
        if self._made:
            return [f"writing, {self._made:,} tokens{STOPS}", f"{self._made:,} tokens{STOPS}"]
        if self._read is None or not self._read[1]:
            spent = f", {elapsed:.0f} s" if elapsed >= 1 else ""
            return [f"{self._doing}{spent}{STOPS}", f"{self._doing}{spent}", f"{elapsed:.0f} s{STOPS}"]
        done, total = self._read
        left = self._left(done, total)
        return [
            f"reading {done:,} of {total:,} tokens{left}{STOPS}",
            f"{done:,}/{total:,} tokens{left}{STOPS}",
            f"{done:,}/{total:,}{left}{STOPS}",
            f"{done:,}/{total:,}{left}",
        ]

    def _left(self, done: int, total: int) -> str:
        reading = time.monotonic() - self._since
        speed = done / reading if done and reading else self._speed
        if not speed:
            return f", {reading:.0f} s" if reading >= 1 else ""
        left = total / speed - reading if not done else (total - done) / speed
        return f", {left:.0f} s left" if left >= 1 else ""

    def _tick(self) -> None:
        while not self._over.wait(TICK_S):
            self._redraw()

    def _redraw(self) -> None:
        with self._lock:
            if self._shown:
                self._draw()

    def _draw(self) -> None:
        output.place(self.text(output.passing(shutil.get_terminal_size().columns)))

    def _wipe(self) -> None:
        output.place("")
