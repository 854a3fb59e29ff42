"""Whether a finished reply fits a JSON Schema: a server may not keep to what it was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher

BEGINNING = re.compile(r'\s*([\[{"\-0-9tfn]|$)')
TRIES = 5000  # orders of keys; a reply whose keys stand as in the schema needs one


class Undecided(Exception):
    """The keys could stand in more orders than there is time to try."""


def misfit(schema: Mapping[str, Any], text: str, ended: bool) -> str | None:
    """What is wrong with a text, None if nothing is; `Undecided` if that takes too long to find out.

    Of a text that was cut off (not `ended`) only its beginning is known. Spelling and order of keys are free in JSON,
    but the grammar knows one of each (see `model/constrain.py`): so it reads the value as this module writes it.
    """
    if not ended:
        return None if BEGINNING.match(text) else "the reply is not JSON"
    from llguidance import LLMatcher, LLTokenizer

    from model.json_schema import parts, rewritten

    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "the reply is not JSON"
    options: Any = {"whitespace_flexible": False, "coerce_one_of": True}
    grammar = LLMatcher.grammar_from_json_schema(rewritten(schema, "--schema"), overrides=options)
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    listed = [name for part in parts(schema) for key in ("properties", "required") for name in part.get(key, ())]
    return None if _fits(matcher, value, list(dict.fromkeys(listed))) else "the reply does not fit it"


def _fits(matcher: LLMatcher, value: Any, listed: list[str]) -> bool:
    """Whether the grammar takes the value with its keys in any order; listed: the names that the schema has.

    What is still to be read is a linked list of values, of bytes that stand as they are, and of objects' open ends.
    """
    ways: list[tuple[int, Any]] = [(0, (value, None))]  # how much was read where another way begins, and the way
    read = 0
    for _ in range(TRIES):
        if not ways:
            return False
        begun, rest = ways.pop()
        matcher.rollback(read - begun)
        read = begun
        while rest is not None:
            head, rest = rest
            if isinstance(head, _Members):
                first, *others = head.ways(listed)
                ways += [(read, _linked(way, rest)) for way in reversed(others)]
                rest = _linked(first, rest)
            elif isinstance(head, dict):
                rest = (_Members(head, b"{"), rest)
            elif isinstance(head, list):
                rest = _linked([b"[", *[part for item in head for part in (b",", item)][1:], b"]"], rest)
            else:
                written = list(head if isinstance(head, bytes) else _written(head))
                if matcher.validate_tokens(written) < len(written):
                    break
                matcher.consume_tokens(written)
                read += len(written)
        else:
            if matcher.is_accepting():
                return True
    raise Undecided


class _Members:
    """The members of an object that are still to be read, and what stands before the next one."""

    def __init__(self, members: Mapping[str, Any], before: bytes) -> None:
        self._members, self._before = members, before

    def ways(self, listed: list[str]) -> list[list[Any]]:
        """What may come next. Names that the schema does not list are free in their order, so that one will do."""
        left = self._members
        if not left:
            return [[b"{}" if self._before == b"{" else b"}"]]
        names = [name for name in listed if name in left]
        names += [name for name in left if name not in listed][:1]
        return [
            [self._before + _written(name) + b":", left[name], _Members({k: left[k] for k in left if k != name}, b",")]
            for name in names
        ]


def _linked(parts: list[Any], rest: Any) -> Any:
    for part in reversed(parts):
        rest = (part, rest)
    return rest


def _written(value: Any) -> bytes:
    """A text, number or constant in the grammar's spelling, which knows no exponents."""
    if isinstance(value, float):
        return (str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}").encode()
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")
