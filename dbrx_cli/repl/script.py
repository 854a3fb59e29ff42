"""A chat from a pipe, or from a terminal that can do no more than show lines: a turn a line."""

from __future__ import annotations

import sys

from dbrx_cli.stdin import decode


class ScriptReader:
    """Reads turns from stdin; the same spellings open more lines as at the prompt."""

    def __init__(self, *, prompts: bool = False) -> None:
        self._prompts = prompts
        self._line = 0

    def read(self) -> str:
        """The next turn as it was written; `EOFError` at the end."""
        text = self._next_line(">>> ")
        if text.startswith('"""'):
            return self._block(text)
        while text.endswith("\\"):
            text += "\n" + self._next_line()
        return text

    def _block(self, text: str) -> str:
        while '"""' not in text[3:]:
            text += "\n" + self._next_line()
        return text[: text.index('"""', 3) + 3]

    def _next_line(self, prompt: str = "... ") -> str:
        if self._prompts:
            print(prompt, end="", flush=True)
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        self._line += 1
        return decode(data, f"line {self._line} of stdin").rstrip("\r\n")
