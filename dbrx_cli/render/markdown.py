"""Markdown while it streams: a block that is finished is printed for good, the last one stands there as it is typed.

The time and the bytes for a reply grow with its length: what is printed is never printed again, and the unfinished
block is plain text that is only appended to. Code is highlighted line by line. A block that is taller than the screen
stays plain, since what has scrolled off cannot be replaced; so does one during which the window changed its size.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.console import Console

from dbrx_cli.engine import Delta, Done
from dbrx_cli.output import moves_cursor
from dbrx_cli.render.blocks import (
    CLOSED_AT_ONCE,
    CLOSED_BY_BLANK,
    CONTEXT,
    Painter,
    Piece,
    Row,
    code_line,
    language,
    pieces,
)
from dbrx_cli.render.plain import safe
from dbrx_cli.render.region import MARGIN, Region


def suits(out: TextIO) -> bool:
    """Whether Markdown can be shown there: a terminal that moves its cursor and has the characters."""
    return moves_cursor(out) and (out.encoding or "").lower().replace("-", "") == "utf8"


class MarkdownRenderer:
    """Shows one reply on a terminal. `before`: what the reply goes on from; its unfinished block is shown again."""

    streams = True

    def __init__(self, out: TextIO | None = None, *, before: str = "") -> None:
        self._out = out or sys.stdout
        self._painter = Painter(Console(file=self._out, force_terminal=True, highlight=False, legacy_windows=False))
        self._parts: list[str] = []  # of what is sent to the terminal next, in one piece
        self._region = Region(*self._size())
        self._lines: list[str] = []  # of the unfinished block; the region holds the same lines
        self._line = ""  # the one that is being written
        self._parse_at = 1  # how many lines there must be before they are parsed again
        self._opening = ""  # the first line of the code block that is being written, if one is
        self._code: list[str] = []  # its last lines
        self._started = False  # something was shown
        if before:
            self._take(safe(before))
            self._show_again()

    def delta(self, delta: Delta) -> None:
        self._region.resize(*self._size())
        self._take(safe(delta.text))
        self._flush()

    def done(self, done: Done) -> None:
        self.broken()

    def broken(self) -> None:
        self._region.resize(*self._size())
        if self._line:
            self._end_line()
        if self._lines:
            self._settle(end=True)
        self._flush()

    def _take(self, text: str) -> None:
        for i, part in enumerate(text.split("\n")):
            if i:
                self._end_line()
            if part:
                self._show(part)

    def _show(self, part: str) -> None:
        """A piece of a line, as it is."""
        if not self._line.strip() and part.strip() and not self._lines and not self._opening:
            self._begin_block()
        self._line += part
        self._parts.append(self._region.add(part))

    def _begin_block(self) -> None:
        if self._started:
            self._parts.append("\n")
        self._started = True

    def _end_line(self) -> None:
        line, self._line = self._line, ""
        if self._opening:
            self._end_code_line(line)
        elif self._lines or line.strip():
            self._lines.append(line)
            self._parts.append(self._region.add("\n"))
            if len(self._lines) >= self._parse_at:
                self._settle()
        elif line:
            self._replace(1, [])

    def _settle(self, end: bool = False) -> None:
        """Print for good what is finished; the rest stays unfinished."""
        found = pieces(self._lines)
        cut = len(self._lines) if end else _cut(found, self._lines)
        if cut:
            self._finish(found, cut)
        if not end and found and found[-1].kind == "fence" and self._lines:
            self._open_code()
        # A long block is not parsed at every line of it: parsing it all grows with its length, not with the square.
        self._parse_at = len(self._lines) + 1 + len(self._lines) // 8

    def _finish(self, found: list[Piece], cut: int) -> None:
        finished, rest = self._lines[:cut], self._lines[cut:]
        self._lines = rest
        if self._region.reach() <= len(rest):  # the unfinished lines too are out of reach
            self._region.forget(cut)
            return
        if not self._replace(len(finished) + len(rest) + 1, self._painted(found, finished)):
            # Too tall: the finished lines stay as they are.
            self._parts.append(self._region.take_back(len(rest) + 1))
            self._region.forget(cut)
        if rest:
            following = next(piece for piece in found if piece.start == cut)
            if not following.follows or not finished[-1].strip():
                self._begin_block()
            self._parts += [self._region.add(line + "\n") for line in rest]

    def _painted(self, found: list[Piece], lines: list[str]) -> list[Row]:
        """Blocks as they stay, blank rows between them."""
        width = max(2, self._size()[0] - MARGIN)
        done = [piece for piece in found if piece.start < len(lines)]
        ends = [*(piece.start for piece in done[1:]), len(lines)]
        rows: list[Row] = []
        for piece, end in zip(done, ends, strict=True):
            if rows and not (piece.follows and lines[piece.start - 1].strip()):
                rows.append([])
            rows += self._painter.markdown("\n".join(lines[piece.start : end]), width)
        return rows

    def _replace(self, lines: int, rows: list[Row]) -> bool:
        """Put rows in the place of the region's last lines; False, and nothing, if they are out of reach."""
        if self._region.reach() < lines:
            return False
        self._parts.append(self._region.take_back(lines) + self._painter.ansi(rows))
        return True

    def _open_code(self) -> None:
        """The unfinished block is code: from here on its lines are final one by one."""
        self._opening, *lines = self._lines
        self._lines, self._code = [], []
        if not self._replace(len(lines) + 2, [self._painter.fence(self._opening)]):
            self._region.forget(len(lines) + 1)
        for line in lines:
            self._show(line)
            self._end_line()

    def _end_code_line(self, line: str) -> None:
        code = code_line(self._opening, line)
        if code is None:
            row = self._painter.fence(line)
        else:
            self._code = [*self._code[1 - CONTEXT :], code]
            row = self._painter.code(self._code, language(self._opening))
        if not self._replace(1, [row]):
            self._parts.append(self._region.add("\n"))
            self._region.forget(1)
        if code is None:
            self._opening = ""
            self._parse_at = 1

    def _show_again(self) -> None:
        """The unfinished block, in the place where the reply goes on."""
        self._region = Region(*self._size())
        self._started = bool(self._lines or self._line or self._opening)
        self._parts = [self._region.add("".join(line + "\n" for line in self._lines) + self._line)]

    def _flush(self) -> None:
        text = "".join(self._parts)
        self._parts.clear()
        if text:
            self._out.write(text)
            self._out.flush()

    def _size(self) -> tuple[int, int]:
        try:
            size = os.get_terminal_size(self._out.fileno())
        except OSError:  # not a terminal: a test
            return 80, 24
        return size.columns or 80, size.lines or 24


def _cut(found: list[Piece], lines: list[str]) -> int:
    """How many of the lines are finished: what came before the last piece, and that too if nothing can be added."""
    if not found:
        return len(lines)  # blank lines
    last = found[-1]
    closed = last.kind in CLOSED_AT_ONCE or (last.kind in CLOSED_BY_BLANK and not lines[-1].strip())
    return len(lines) if closed else last.start
