"""The one way to the terminal for all but a reply as it streams (render/): what others wrote is shown, never obeyed.

tests/test_foreign_text.py holds that nothing else prints.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from model.foreign_text import escaped, on_one_line

# JSON has another spelling for each of these: DEL, C1, ends of lines and directions of Unicode, halves of characters.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def tell(text: str) -> None:
    """A line on stderr."""
    tell_lines(on_one_line(text))


def tell_lines(text: str, end: str = "\n", *, dim: bool = False) -> None:
    """Text on stderr that may have several lines."""
    text = escaped(text)
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, end=end, file=sys.stderr, flush=True)


def say(text: str, end: str = "\n") -> None:
    """Text on stdout: on a terminal escaped, into a pipe as it is."""
    if sys.stdout.isatty():
        text = escaped(text)
    print(text, end=end, flush=True)


def say_json(value: Any, indent: int | None = None) -> None:
    """A value as JSON on stdout."""
    print(to_json(value, indent), flush=True)


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON: readable in every language, and harmless wherever it is shown."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
