"""A chat from a pipe: a turn a line."""

from __future__ import annotations

import sys

from dbrx_cli.stdin import decode


class ScriptReader:
    """Reads turns from stdin; the same spellings open more lines as at the prompt."""

    def __init__(self) -> None:
        self._line = 0

    def read(self) -> str:
        """The next turn; `EOFError` at the end."""
        text = self._next_line()
        if text.startswith('"""'):
            return self._block(text[3:])
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._next_line()
        return text

    def _block(self, text: str) -> str:
        while '"""' not in text:
            text += "\n" + self._next_line()
        return text[: text.index('"""')].strip("\n")

    def _next_line(self) -> str:
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        self._line += 1
        return decode(data, f"line {self._line} of stdin").rstrip("\r\n")
