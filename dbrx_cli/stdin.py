"""What is piped to the program, as text."""

from __future__ import annotations

import sys
from typing import Literal

from model.errors import InputError

InputErrors = Literal["strict", "replace"]


def read_piped(errors: InputErrors = "strict") -> str | None:
    """All of stdin; None if it is a terminal, closed or empty. `InputError` names the first byte that is not UTF-8."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    return decode(sys.stdin.buffer.read(), "stdin", errors) or None


def decode(data: bytes, source: str, errors: InputErrors = "strict") -> str:
    """UTF-8 -> text; a byte order mark at the front is left out."""
    try:
        return data.decode("utf-8", errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            "convert it (iconv -t UTF-8), or go on with --input-errors replace",
        ) from None


def check_argument(text: str, name: str) -> str:
    """Text from the command line; `InputError` if its bytes were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{name} is not UTF-8", "check the terminal's encoding, or pipe the text to stdin") from None
    return text
