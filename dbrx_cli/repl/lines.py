"""What was typed: a command or a message, and which lines belong to it."""

from __future__ import annotations

from typing import NamedTuple

BLOCK = '"""'


class Line(NamedTuple):
    """One turn of the user."""

    text: str
    command: bool = False


def typed(text: str) -> Line:
    """What a text means that was typed, its lines put together."""
    if text.startswith(BLOCK):
        whole = len(text) >= 2 * len(BLOCK) and text.endswith(BLOCK)
        # More behind the end: then the quotes are the message's own, such as those of a docstring.
        return Line(text.removeprefix(BLOCK).removesuffix(BLOCK).strip("\n") if whole else text)
    return Line(text, text.startswith("/"))


class Block:
    """The lines of a text that begins with three quotes, until others close it.

    Those of a docstring in it do not: one that begins and ends on its line, or begins behind an indentation.
    """

    def __init__(self, text: str) -> None:
        self._lines: list[str] = []
        self._marks = 0
        self.open = True
        for line in text.split("\n"):
            self.add(line)

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    def add(self, line: str) -> None:
        self._lines.append(line)
        marks = line.count(BLOCK)
        self._marks += marks
        docstring = marks == 1 and line[0].isspace() and line.lstrip().startswith(BLOCK)
        if marks and self._marks % 2 == 0 and not docstring:
            self.open = False
