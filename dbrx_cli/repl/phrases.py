"""Small wordings: a quote of a message, a number of things, a time."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rich.filesize import decimal

from dbrx_cli.files import apart
from model.foreign_text import on_one_line


def quote(text: str, length: int = 60) -> str:
    """The beginning of a text on one line, in quotation marks."""
    line = on_one_line(" ".join(text[: 4 * max(length, 10)].split()))
    length = max(length, 10)
    return f'"{line if len(line) <= length else line[: length - 1] + "…"}"'


def quote_message(text: str, length: int = 60) -> str:
    """The same of a message, without the files before it."""
    return quote(apart(text)[1], length)


def words(text: str) -> list[str]:
    """The words of an argument as a shell has them: quotes hold them together; one that is left open is a letter."""
    try:
        return shlex.split(text)
    except ValueError:
        return [text]


def unquoted(text: str) -> str:
    """A name as it was meant, if it was typed in quotation marks."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def count(number: int, thing: str) -> str:
    """1 token, 2 tokens."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """About how long something takes."""
    if seconds < 1:
        return "under a second"
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"


def card_in_words(card: Mapping[str, Any]) -> str:
    """What `DbrxForCausalLM.on_card` tells, in one line."""
    places = ", ".join(f"{count(number, 'expert')} on {place}" for place, number in card["experts"].items())
    bus = card["bus_bytes"]
    crossed = f"; over the bus {decimal(bus['down'])} down, {decimal(bus['up'])} up" if bus else ""
    crossed += f", {decimal(bus['weights'])} of experts" if bus and bus["weights"] else ""
    return f"{card['kernels']}; graph {card['graph']}; {places}{crossed}"
