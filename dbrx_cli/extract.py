"""The first fenced code block of a reply, while the reply comes (CommonMark 0.31, section 4.5)."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import replace

from dbrx_cli.engine import Delta, Done
from model.errors import DbrxError

Stream = Generator[Delta | Done, None, None]

# Markers of list items in front of a line, then its indentation.
LEAD = re.compile(r"((?: *(?:[-*+]|\d{1,9}[.)])(?= ))*)( *)")
OPENING = re.compile(r"(`{3,})[^`]*|(~{3,}).*")


class FirstBlock:
    """Finds the block in text that comes in pieces; what `push` and `finish` return, joined, is what is in it.

    The end of its last line is left out. Fences inside list items count, at their item's indentation.
    """

    def __init__(self) -> None:
        self._line = ""  # of the line that is under way, what is not decided yet
        self._inside = False  # behind the beginning of a line that belongs to the block
        self._item = 0  # columns by which the deepest list item so far is indented
        self._fence = ""  # that opened the block
        self._indent = 0  # of that fence
        self._end = ""  # of the last line, shown only when another line follows
        self.closed = False

    @property
    def found(self) -> bool:
        """Whether a block has begun."""
        return bool(self._fence)

    def push(self, text: str) -> str:
        """Take a piece of the reply; returns the part of the block that became certain."""
        shown = ""
        for part in re.findall(r"[^\n]*\n|[^\n]+", text):
            if not self.closed:
                shown += self._take(part.removesuffix("\n"), part.endswith("\n"))
        return shown

    def finish(self) -> str:
        """The reply is complete; returns what was held back."""
        if not self.found:
            self._look_for_opening()
        elif self._line and not self.closed and not self._closes():
            return self._content(self._line, ended=False)
        return ""

    def _take(self, text: str, ended: bool) -> str:
        self._line += text
        if not self.found:
            if ended:
                self._look_for_opening()
                self._line = ""
            return ""
        if not self._inside and ended and self._closes():
            self.closed = True
            return ""
        if not self._inside and not ended and self._may_close():
            return ""
        shown = self._content(self._line, ended)
        self._line = ""
        return shown

    def _content(self, text: str, ended: bool) -> str:
        if not self._inside:  # the fence's own indentation is no part of the block's lines
            text = re.sub(f"^ {{0,{self._indent}}}", "", text)
        self._inside = not ended
        shown, self._end = self._end + text, "\n" if ended else ""
        return shown

    def _look_for_opening(self) -> None:
        line = self._line.rstrip("\r")
        lead = LEAD.match(line)
        assert lead
        markers, spaces = lead[1], lead[2]
        limit = 4 if markers else self._item + 3
        opening = OPENING.fullmatch(line, lead.end())
        if opening and len(spaces) <= limit:
            self._fence, self._indent = opening[1] or opening[2], lead.end()
        elif markers:
            self._item = max(self._item, len(markers) + 1)

    def _closes(self) -> bool:
        fence = re.escape(self._fence[0])
        return bool(re.fullmatch(f" {{0,{self._indent + 3}}}{fence}{{{len(self._fence)},}}[ \\t\\r]*", self._line))

    def _may_close(self) -> bool:
        """Whether the line may yet become the closing fence, so far as it has come."""
        return bool(re.fullmatch(f" *{re.escape(self._fence[0])}*[ \\t\\r]*", self._line))


class CodeOnly:
    """Passes a reply's stream on with nothing but its first code block as text, and ends the reply behind it."""

    def __init__(self) -> None:
        self._block = FirstBlock()
        self.reply: Done | None = None  # as it came, with all of its text

    def of(self, stream: Stream) -> Stream:
        """The stream to show instead of `stream`; `DbrxError` at its end if there was no block."""
        text = ""
        interrupted = ended = False
        event = next(stream)
        while isinstance(event, Delta):
            try:
                piece = self._block.push(event.text)
                text += piece
                yield replace(event, text=piece)
            except KeyboardInterrupt:
                interrupted = True
            if not ended and (interrupted or self._block.closed):
                ended = True
                event = stream.throw(KeyboardInterrupt())
            else:
                event = next(stream)
        assert isinstance(event, Done)
        if ended and not interrupted:
            event = replace(event, finish_reason="stop")
        self.reply = event
        rest = self._block.finish()
        if not self._block.found and not interrupted:
            raise DbrxError("the reply has no fenced code block", "leave out --extract to see it")
        if rest:
            yield Delta(rest, None)
        yield replace(event, text=text + rest)
