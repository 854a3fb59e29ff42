"""Text that others wrote (names, keys, values, messages), on its way to a terminal or a log: shown, never obeyed."""

from __future__ import annotations

import re

LONGEST = 800  # characters of a line, beyond which its middle is left out
TAIL = 300

# Controls (C0, DEL, C1), what ends a line elsewhere, what turns the direction of text around, halves of characters.
_OBEYED = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_LINES = re.compile(f"[{_OBEYED}]")
_IN_TEXT = re.compile(f"(?![\t\n])[{_OBEYED}]")


def on_one_line(text: str, most: int = LONGEST) -> str:
    """The text on one line of at most about `most` characters, with what a terminal would obey spelled as escapes.

    The end stays, since it says what to do next.
    """
    if len(text) > most:
        tail = min(TAIL, most // 2)
        text = f"{text[: most - tail]} [... {len(text) - most} characters ...] {text[-tail:]}"
    return _IN_LINES.sub(_spelled, text)


def escaped(text: str) -> str:
    """The text with what a terminal would obey spelled as escapes; tabs and ends of lines stay."""
    return _IN_TEXT.sub(_spelled, text)


def _spelled(found: re.Match[str]) -> str:
    """`\\n`, `\\x1b`, `\\u202e`."""
    return found[0].encode("unicode_escape").decode("ascii")
