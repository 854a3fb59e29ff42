"""JSON that others wrote, read with bounds: what Python makes of a text can be forty times its size, and take as long.

So bytes and entries are counted before anything is parsed, and depth behind it. Faults are `ValueError`, in words for
the user; who reads a file puts its name before them.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
DEEPEST = 64  # lists and objects inside each other; DBRX's own files have 6


class Limits(NamedTuple):
    """What no real file of a kind reaches. entries: commas, colons and opening brackets, those in strings, too."""

    nbytes: int
    entries: int


# A config.json has 2 KB, a tokenizer_config.json of DBRX 50 KB with its template.
CONFIG = Limits(4 * 2**20, 250_000)
# 100,000 tokens and as many merges, each a list of two, come to 6 MB and 600,000 entries; the largest known has 17 MB.
TOKENIZER = LISTING = Limits(20 * 2**20, 1_200_000)


def parse_file(content: bytes, limits: Limits = CONFIG) -> Any:
    """What `parse` gives, of a file, where no other half of a surrogate pair comes later, as it may in a stream."""
    value = parse(content, limits)
    if holds_half_a_pair(content, value):
        raise ValueError("holds half of a surrogate pair, which is no character")
    return value


def holds_half_a_pair(content: bytes, value: Any) -> bool:
    """Whether a string of the value is no Unicode, since the text spells half of a surrogate pair."""
    if not SURROGATE.search(content):
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def parse(content: bytes, limits: Limits = CONFIG) -> Any:
    """A value of JSON in UTF-8. NaN and infinities are let through, for the one that knows what a key may be."""
    if len(content) > limits.nbytes:
        raise ValueError(f"has {len(content)} bytes, more than any such file needs")
    if (entries := sum(map(content.count, (b",", b":", b"[", b"{")))) > limits.entries:
        raise ValueError(f"has {entries} entries, more than any such file needs")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except _Twice as error:
        raise ValueError(f"is not valid JSON: the key {error.args[0]!r:.80} occurs twice") from None
    except ValueError:  # Python's limit of digits
        raise ValueError("holds a number of thousands of digits") from None
    _check_depth(value)
    return value


class _Twice(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        raise _Twice(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return values


def _check_depth(value: Any) -> None:
    """Level by level, since a walk that calls itself would end where it is needed."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [inner for values in inside for inner in values if isinstance(inner, dict | list)]
    if level:
        raise ValueError("is nested too deeply")
