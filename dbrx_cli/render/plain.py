"""The text as it is; on a terminal without control characters, which could move its cursor or set its title."""

from __future__ import annotations

import sys
from typing import TextIO

from dbrx_cli.engine import Delta, Done

# A terminal acts on C0 but tab and newline, on DEL and on C1. The others turn the direction of text around, which no
# language needs for its words. Nobody can print half a character.
_CONTROL = dict.fromkeys([c for c in range(0x20) if c not in (0x09, 0x0A)] + list(range(0x7F, 0xA0)))
_CONTROL |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])
_CONTROL |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def safe(text: str) -> str:
    """A reply as a terminal shows it and never obeys it: what would spoil its look is left out."""
    return text.translate(_CONTROL)


class PlainRenderer:
    """Writes each piece at once (`stream`), or the whole at the end."""

    def __init__(self, out: TextIO | None = None, *, stream: bool = True) -> None:
        self.out = out or sys.stdout
        self.stream = stream
        self.terminal = self.out.isatty()
        self.streams = stream and self.terminal
        self._amid = False  # a line

    def delta(self, delta: Delta) -> None:
        if self.stream and delta.text:
            self._write(delta.text)

    def done(self, done: Done) -> None:
        # A reply ends its line, on a terminal and in a pipe, so that the next one starts on its own.
        self._write("\n" if self.stream else done.text + "\n")

    def broken(self) -> None:
        if self.terminal and self._amid:  # the fault is told on a line of its own
            self._write("\n")

    def _write(self, text: str) -> None:
        self._amid = not text.endswith("\n")
        self.out.write(safe(text) if self.terminal else text)
        self.out.flush()
