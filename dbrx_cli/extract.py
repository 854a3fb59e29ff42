"""The first fenced code block of a reply, while the reply comes. What is one is CommonMark's affair: markdown-it's."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING

from dbrx_cli.engine import Delta, Done
from model.errors import DbrxError

if TYPE_CHECKING:
    from markdown_it.token import Token

Stream = Generator[Delta | Done, None, None]

MARKS = ("```", "~~~")  # a line without one of these opens no block


class FirstBlock:
    """Finds the block in text that comes in pieces; what `push` and `finish` return, joined, is what is in it.

    The end of its last line is left out. CommonMark reads line by line: what a line is depends on those before it, and
    inside a block on those that opened it and the quotes and lists around it. So only these are kept, and parsed again
    with each line that comes.
    """

    def __init__(self) -> None:
        from markdown_it import MarkdownIt

        self._markdown = MarkdownIt("commonmark").disable("inline")
        self._carriage_return = False  # the last character, which may be half of a line's end
        self._lines = ""  # before the block: all; inside it: those that opened it
        self._blank = ""  # lines that wait: the block's, or behind its end
        self._line = ""  # that is under way
        self._shown = False  # whether what came of it is
        self._fence = ""  # a character of it
        self._end = ""  # of the last line, shown only when another line follows
        self.closed = False

    @property
    def found(self) -> bool:
        """Whether a block has begun."""
        return bool(self._fence)

    def push(self, text: str) -> str:
        """Take a piece of the reply; returns the part of the block that became certain."""
        text = "\r" * self._carriage_return + text
        self._carriage_return = text.endswith("\r")
        text = re.sub("\r\n?", "\n", text.removesuffix("\r")).replace("\0", "\ufffd")
        shown = ""
        for part in re.findall(r"[^\n]*\n|[^\n]+", text):
            if not self.closed:
                shown += self._take(part)
        return shown

    def finish(self) -> str:
        """The reply is complete; returns what was held back."""
        shown = self.push("\n") if self._carriage_return else ""
        if not self.found:
            self._look_for_opening()
        elif not self._shown and not self.closed:
            shown += self._decide()
        return shown

    def _take(self, part: str) -> str:
        self._line += part
        ended, shown = part.endswith("\n"), ""
        if not self.found:
            if ended:
                self._look_for_opening()
            return ""
        if self._shown:
            shown = part.removesuffix("\n")
        elif not self._line.strip(" \t\n"):
            self._blank += self._line if ended else ""
        elif ended or not re.fullmatch(rf"[ \t>]*{self._fence}*[ \t]*", self._line):
            # Around a block there are only quotes and lists: behind their marks the first letter decides.
            shown = self._decide()
        if ended:
            self._end = "\n" if self._shown else self._end
            self._line, self._shown = "", False
        return shown

    def _look_for_opening(self) -> None:
        """Whether the line opens the block; from then on, only what is around it is kept."""
        self._lines += self._line
        if any(mark in self._line for mark in MARKS) and (found := self._parse(self._lines)):
            outermost, fence = found
            self._fence = fence.markup[0]
            lines = self._lines.removesuffix("\n").split("\n")
            self._lines = "".join(line + "\n" for line in lines[outermost.map[0] if outermost.map else 0 :])
        self._line = ""

    def _decide(self) -> str:
        """What of the line, as far as it has come, is the block's; if nothing is, the block has ended."""
        found = self._parse(self._lines + self._blank + self._line)
        assert found
        content = found[1].content
        lines = content.removesuffix("\n").split("\n") if content else []
        self._shown = len(lines) > self._blank.count("\n")
        self.closed = not self._shown
        shown = self._end + "\n".join(lines) if lines else ""
        self._blank = ""
        return shown

    def _parse(self, text: str) -> tuple[Token, Token] | None:
        """The first fence, behind the outermost block around it, which may be itself."""
        outermost = None
        for token in self._markdown.parse(text):
            if token.level == 0 and token.nesting >= 0:
                outermost = token
            if token.type == "fence" and outermost is not None:
                return outermost, token
        return None


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
