"""The one way to the terminal for all but a reply as it streams (render/): what others wrote is shown, never obeyed.

tests/test_foreign_text.py holds that nothing else prints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from textwrap import fill
from typing import Any, TextIO

from model.foreign_text import escaped, on_one_line

# JSON has another spelling for each of these: DEL, C1, ends of lines and directions of Unicode, halves of characters.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


PLAIN = "DBRX_PLAIN"  # set where nothing may move the cursor
above: list[Callable[[], AbstractContextManager[None]]] = []  # makes room for a line above what stays (see `status`)


def moves_cursor(stream: TextIO | None) -> bool:
    """Whether it is a terminal that can do more than show lines, and may."""
    able = os.environ.get("TERM", "dumb") not in ("dumb", "unknown") and not os.environ.get(PLAIN)
    return able and stream is not None and stream.isatty()


def place(text: str) -> None:
    """A line on stderr in the place of the one before, with the cursor behind it; nothing wipes it."""
    dimmed = f"\x1b[2m{escaped(text)}\x1b[0m" if text else ""
    print(f"\r\x1b[K{dimmed}", end="", file=sys.stderr, flush=True)


def passing(columns: int) -> int:
    """For a row that is wiped again: a terminal shows ^C behind it, which must not begin another row."""
    return max(10, columns - len("^C") - 1)


def restore(*, last: bool = False) -> None:
    """Before the process ends without a word: no line of what is waited for stays, and the cursor shows.

    last: it ends at once, and no other thread shows anything meanwhile.
    """
    if moves_cursor(sys.stderr):
        terminal = os.dup(2) if last else 2
        if last:  # to write lets go of Python's lock, for which a thread that shows a line may be waiting
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(terminal, b"\r\x1b[K\x1b[?25h")


def tell(text: str, *, dim: bool = False) -> None:
    """A line on stderr; on a terminal wrapped by words."""
    tell_lines(_by_words(on_one_line(text)), dim=dim)


def _by_words(text: str) -> str:
    """The line as a terminal shows it. What is longer than a row (a path, an address) stays whole, to be copied."""
    columns = shutil.get_terminal_size().columns
    if len(text) <= columns or sys.stderr is None or not sys.stderr.isatty():
        return text
    return fill(text, max(20, columns - 1), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def tell_lines(text: str, end: str = "\n", *, dim: bool = False) -> None:
    """Text on stderr that may have several lines."""
    text = escaped(text)
    with room():
        print(f"\x1b[2m{text}\x1b[0m" if dim else text, end=end, file=sys.stderr, flush=True)


def say(text: str, end: str = "\n") -> None:
    """Text on stdout: on a terminal escaped, into a pipe as it is."""
    if sys.stdout.isatty():
        text = escaped(text)
    with room():
        print(text, end=end, flush=True)


def room() -> AbstractContextManager[None]:
    """Inside, the line that says what is waited for gives its place to what is printed."""
    return above[-1]() if above else nullcontext()


def say_json(value: Any, indent: int | None = None) -> None:
    """A value as JSON on stdout."""
    with room():
        print(to_json(value, indent), flush=True)


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON: readable in every language, and harmless wherever it is shown."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
