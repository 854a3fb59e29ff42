"""What is piped to the program, as text."""

from __future__ import annotations

import sys
from typing import Literal

from model.errors import InputError
from model.messages import MAX_TEXT

InputErrors = Literal["strict", "replace"]


def read_piped(errors: InputErrors = "strict") -> str | None:
    """All of stdin; None if it is a terminal, closed or empty.

    `InputError` names the first byte that is not UTF-8, and refuses more than any context holds: before a model is
    loaded, and without waiting for the end of what may have none.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    data = sys.stdin.buffer.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise InputError(f"stdin holds more than {MAX_TEXT // 2**20} MiB", "pipe a part of it")
    return decode(data, "stdin", errors) or None


def decode(data: bytes, source: str, errors: InputErrors | None = None) -> str:
    """UTF-8 -> text; a byte order mark at the front is left out. errors: `--input-errors`, None where there is none."""
    try:
        return data.decode("utf-8", errors or "strict").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            "convert it (iconv -t UTF-8)" + (", or go on with --input-errors replace" if errors else ""),
        ) from None


def check_argument(text: str, name: str) -> str:
    """Text from the command line; `InputError` if its bytes were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{name} is not UTF-8", "check the terminal's encoding, or pipe the text to stdin") from None
    return text
