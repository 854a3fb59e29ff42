"""A chat from a pipe, or from a terminal that can do no more than show lines: a turn a line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from dbrx_cli.output import say
from dbrx_cli.repl.lines import BLOCK, Block, Line, typed
from dbrx_cli.stdin import decode
from model.errors import InputError

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl


class ScriptReader:
    """Reads turns from stdin; the same spellings open more lines as at the prompt."""

    def __init__(self, repl: Repl) -> None:
        self._repl = repl
        self._line = 0

    def read(self) -> Line:
        """The next turn; `EOFError` at the end, `InputError` if that is inside a block."""
        with self._repl.typed.left_to_prompt(), self._repl.signals.heard():
            text = self._next_line(">>> ")
            if text is None:
                if self._repl.interactive:
                    say("")  # the terminal's own line editing ends no line at Ctrl-D
                raise EOFError
            if text.startswith(BLOCK):
                return self._block(text)
            while text.endswith("\\") and (more := self._next_line()) is not None:
                text = f"{text[:-1]}\n{more}"
            return typed(text)

    def drop(self) -> None:
        """Nothing is read ahead."""

    def remember(self, text: str) -> None:
        """Nothing is offered again."""

    def _block(self, text: str) -> Line:
        start, block = self._line, Block(text)
        while block.open:
            if (more := self._next_line()) is None:
                raise InputError(f"the block that line {start} of stdin opens has no end", f"end it with {BLOCK}")
            block.add(more)
        return typed(block.text)

    def _next_line(self, prompt: str = "... ") -> str | None:
        if self._repl.interactive:
            say(prompt, end="")
        data = sys.stdin.buffer.readline()
        if not data:
            return None
        self._line += 1
        return decode(data, f"line {self._line} of stdin").rstrip("\r\n")
