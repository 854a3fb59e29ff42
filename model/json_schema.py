r"""A JSON Schema as the engine of constrained decoding keeps it exactly: rewritten where it would read it otherwise.

What it cannot keep is refused here, or by the engine itself. Rewritten are patterns (ECMA-262's), days that a calendar
has, bounds beyond 2^53, definitions that could never end. docs/generate.md has the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from .errors import InputError

EXACT = 2**53  # the engine's numbers are float64: from here on they are not exact
LONGEST = 10**9  # of a text or an array, more than any context holds
LONGEST_CHAIN = 100  # references that lead from one to the next: following them takes the cube of their number
ROOT = "schema"  # under which the whole stands, so that parts of it can stand beside it
NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
OPTIONS = "x-guidance"  # the engine's own: a user's schema has no say in them
REMARKS = {"default", "examples", "title", "description", "$comment", OPTIONS}
LENGTHS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
SIDES = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}
# A control character that JSON has no letter for.
CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")

_LEAP_YEAR = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_NO_YEAR_0 = r"(?:\d{3}[1-9]|\d\d[1-9]0|\d[1-9]00|[1-9]000)"
_DAY = (
    rf"(?:{_NO_YEAR_0}-(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|{_NO_YEAR_0}-(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    rf"|{_NO_YEAR_0}-02-(?:0[1-9]|1\d|2[0-8])|{_LEAP_YEAR}-02-29)"
)
# Beyond the engine's own formats: February's days, no year 0, no second 60 (right in a few minutes of history only).
FORMATS: dict[str, dict[str, Any]] = {
    "date": {"pattern": f"^{_DAY}$"},
    "date-time": {"pattern": rf"^{_DAY}[Tt]\d\d:\d\d:[0-5]"},
    "time": {"pattern": r"^\d\d:\d\d:[0-5]"},
    "hostname": {"maxLength": 253},
}


def rewritten(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The schema for the engine; `InputError` names what cannot be kept exactly."""
    root = dict(schema)
    try:
        new = _Rewriter(root, name).part(root)
    except RecursionError:
        raise InputError(f"{name} is nested too deeply", "flatten it") from None
    if new is False:
        raise InputError(f"{name}: nothing fits: a definition requires itself without an end", "let it end, as by null")
    return {"$defs": {ROOT: new}, "$ref": f"#/$defs/{ROOT}"}


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """All subschemas, the schema itself first; never what only looks like one inside a constant."""
    waiting = [schema]
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, dict):
            continue
        yield schema
        for key, value in schema.items():
            if key in NAMED and isinstance(value, dict):
                waiting += value.values()
            elif key not in ("const", "enum") and key not in REMARKS:
                waiting += value if isinstance(value, list) else [value]


def strings(value: Any) -> Iterator[str]:
    """All strings inside a JSON value, names too."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def overlapping(schema: Mapping[str, Any], is_empty: Callable[[dict[str, Any]], bool]) -> tuple[int, int] | None:
    """Which two cases of a `oneOf` of a rewritten schema may fit one value; is_empty: whether nothing fits a schema."""
    for part in parts(schema):
        cases = part.get("oneOf")
        around = {key: value for key, value in part.items() if key not in ("oneOf", "$defs")}
        for (i, a), (j, b) in combinations(enumerate(cases if isinstance(cases, list) else ()), 2):
            if _apart(a, b):
                continue
            if not is_empty({"$defs": schema["$defs"], "allOf": [around, a, b]}):
                return i, j
    return None


def _apart(a: Any, b: Any) -> bool:
    """Whether two cases are different constants. Python takes 1 for True, so equal ones may still differ."""
    return isinstance(a, dict) and isinstance(b, dict) and "const" in a and "const" in b and a["const"] != b["const"]


class _Rewriter:
    """Knows the whole schema, for its references, and what to call it in a fault."""

    def __init__(self, root: dict[str, Any], name: str) -> None:
        self._root, self._name = root, name
        self._id = root.get("$id") if isinstance(root.get("$id"), str) else None

    def part(self, schema: Any) -> Any:
        """A subschema; what is none is left for the engine to refuse."""
        if not isinstance(schema, dict):
            return schema
        if not self._can_end(schema, frozenset()):
            return False
        self._refuse_open_zero(schema)
        new: dict[str, Any] = {}
        for key, value in schema.items():
            if key in REMARKS or (key == "$id" and schema is self._root):
                continue
            new[key] = self._keyword(key, value)
        format = new.get("format")
        if isinstance(format, str) and (more := FORMATS.get(format)):
            new["allOf"] = [*new.get("allOf", []), {key: self._keyword(key, value) for key, value in more.items()}]
        if isinstance(new.get("patternProperties"), dict):
            new["patternProperties"] = {self._pattern(key): value for key, value in new["patternProperties"].items()}
        return new

    def _keyword(self, key: str, value: Any) -> Any:
        if key in ("const", "enum"):
            self._exact(key, value)
            return value
        if key in NAMED and isinstance(value, dict):
            return {name: self.part(each) for name, each in value.items()}
        if isinstance(value, dict):
            return self.part(value)
        if isinstance(value, list):
            return [self.part(each) for each in value]
        if key == "$ref" and isinstance(value, str):
            pointer = self._pointer(value)
            return value if pointer is None else f"#/$defs/{ROOT}{pointer}"
        if key == "pattern" and isinstance(value, str):
            return self._pattern(value)
        return self._number(key, value) if _is_number(value) else value

    def _number(self, key: str, value: float) -> float:
        side = SIDES.get(key, 0)
        if side and -math.inf < value * side < -EXACT:  # nothing beyond is written: the text fits all the same
            return -side * EXACT
        if key in LENGTHS:
            value = int(value) if isinstance(value, float) and value.is_integer() else value
            return min(value, LONGEST) if key.startswith("max") else value
        if side or key == "multipleOf":
            self._exact(key, value)
        return value

    def _refuse_open_zero(self, schema: dict[str, Any]) -> None:
        """`InputError` for a range between 0, left out, and less than 1: the engine would let 0 in."""
        for bounds in self._bounds(schema, frozenset()):
            for key, side in SIDES.items():
                if key.startswith("exclusive") and {(side, 0), (-side, 1)} <= bounds:
                    fault = f"{self._name}: {key} 0 cannot be kept beside a bound between 0 and {side}"
                    raise InputError(fault, f'set "{key.removeprefix("exclusive").lower()}": {side * 0.0001}')

    def _bounds(self, schema: Any, behind: frozenset[str]) -> set[frozenset[tuple[int, int]]]:
        """For each case of a schema the bounds that meet in it: (side, 0) at 0, left out, (side, 1) less than 1 off."""
        if not isinstance(schema, dict):
            return {frozenset()}
        numbers = {key: value for key, value in schema.items() if key in SIDES and _is_number(value)}
        zeros = {(SIDES[key], 0) for key, value in numbers.items() if value == 0 and key.startswith("exclusive")}
        fractions = {(SIDES[key], 1) for key, value in numbers.items() if 0 < -SIDES[key] * value < 1}
        found = {frozenset(zeros | fractions)}
        groups = [[each] for each in _list(schema.get("allOf"))]
        groups += [_list(schema.get(key)) for key in ("anyOf", "oneOf")]
        more = [{each for case in group for each in self._bounds(case, behind)} for group in groups if group]
        ref = schema.get("$ref")
        pointer = self._pointer(ref) if isinstance(ref, str) else None
        if pointer is not None and pointer not in behind:
            more.append(self._bounds(self._target(pointer), behind | {pointer}))
        for cases in more:
            found = {one | other for one in found for other in cases}
        return found

    def _exact(self, key: str, value: Any) -> None:
        """`InputError` for a number, however deep, that the engine would change."""
        if isinstance(value, dict | list):
            for each in value.values() if isinstance(value, dict) else value:
                self._exact(key, each)
        elif _is_number(value) and not abs(value) <= EXACT:
            fault = f"{self._name}: {key} {str(value)[:40]} cannot be kept: numbers are exact up to 2^53"
            raise InputError(fault, 'take a smaller one, or a string ("type": "string")')

    def _pattern(self, pattern: str) -> str:
        try:
            return engine_pattern(pattern)
        except ValueError as error:
            raise InputError(f"{self._name}: pattern {pattern[:80]!r}: {error}", "change it") from None

    def _pointer(self, ref: str) -> str | None:
        """A reference into this schema as a pointer from its root ("" is the root); None for any other."""
        if self._id is not None:
            ref = ref.removeprefix(self._id.removesuffix("#"))
        return ref[1:] if ref == "#" or ref.startswith("#/") else None

    def _target(self, pointer: str) -> Any:
        """What a pointer leads to, None if nothing is there."""
        found: Any = self._root
        for step in unquote(pointer).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdecimal() and len(step) < 10 and int(step) < len(found):
                found = found[int(step)]
            else:
                found = found.get(step) if isinstance(found, dict) else None
        return found

    def _together(self, schema: Any, behind: frozenset[str]) -> Iterator[tuple[dict[str, Any], frozenset[str]] | None]:
        """A schema and all that `allOf` and references join to it, each with what led there; None for a circle."""
        if not isinstance(schema, dict):
            return
        if len(behind) > LONGEST_CHAIN:
            raise RecursionError
        yield schema, behind
        for each in _list(schema.get("allOf")):
            yield from self._together(each, behind)
        ref = schema.get("$ref")
        pointer = self._pointer(ref) if isinstance(ref, str) else None
        if pointer in behind:
            yield None
        elif pointer is not None:
            yield from self._together(self._target(pointer), behind | {pointer})

    def _can_end(self, schema: Any, behind: frozenset[str]) -> bool:
        """Whether some finite value could fit, as far as references tell; behind: those that lead here.

        A definition that requires itself fits nothing, but a parser goes on with it for ever.
        """
        joined: _Joined = []
        for each in self._together(schema, behind):
            if each is None:
                return False
            joined.append((each[0], partial(self._can_end, behind=each[1])))
        for part, ends in joined:
            if any((cases := _list(part.get(key))) and not any(map(ends, cases)) for key in ("anyOf", "oneOf")):
                return False
        endless = [kind for kind, can in (("object", _object_can_end), ("array", _array_can_end)) if not can(joined)]
        types = [_list(part.get("type")) or [part.get("type")] for part, _ in joined]
        return not any(all(kind in endless for kind in kinds) for kinds in types)


_Joined = list[tuple[dict[str, Any], Callable[[Any], bool]]]  # schemas that hold together, and what can end in each


def _object_can_end(joined: _Joined) -> bool:
    required = {key for part, _ in joined for key in _list(part.get("required")) if isinstance(key, str)}
    some = any(_least(part, "minProperties") >= 1 for part, _ in joined)
    for part, ends in joined:
        listed, patterns = (_dict(part.get(key)) for key in ("properties", "patternProperties"))
        other = None if patterns else part.get("additionalProperties")
        if not all(ends(listed.get(key, other)) for key in required):
            return False
        free = [*listed.values(), *patterns.values(), part.get("additionalProperties")]
        free = [each for each in free if each is not False]
        if some and free and not any(map(ends, free)):
            return False
    return True


def _array_can_end(joined: _Joined) -> bool:
    least = max((_least(part, "minItems") for part, _ in joined), default=0)
    for part, ends in joined:
        first = [*_list(part.get("prefixItems")), part.get("items")]
        if not all(map(ends, first[: int(min(least, len(first)))])):
            return False
    return True


def _least(schema: Mapping[str, Any], key: str) -> float:
    least = schema.get(key)
    return least if isinstance(least, int | float) else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


_TOKEN = re.compile(
    r"\\u\{[0-9a-fA-F]+\}|(?:\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[0-9a-fA-F]{4}"
    r"|\\x[0-9a-fA-F]{2}|\\[pP]\{[^}]*\}|\\c[A-Za-z]|\\.|\(\?.?.?|\[\^?|.",
    re.DOTALL,
)
_WHITE = r"\t-\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}"
_CODES = {"0": 0, "b": 8, "v": 11}  # of one letter, `b` in a class alone
_DOT = r"[^\n\r\x{2028}\x{2029}]"


def engine_pattern(pattern: str) -> str:
    """ECMA-262's regular expression (with the flag u) in the engine's language, Rust's.

    `ValueError` for what ECMA-262 does not know; what the engine does not know is left for it to refuse.
    """
    new: list[str] = []
    inside, before = "", ""  # what began the class [...] that is open; the token before
    for token in _TOKEN.findall(pattern):
        if token[0] == "\\":
            new.append(_escape(token, inside))
        elif inside and token[0] == "[":
            new.append("".join("\\" + character for character in token))
            token = "\\["
        elif inside and token in "&~":
            new.append("\\" + token)
        elif inside and token == before == "-":
            raise ValueError(r"-- in a class is ambiguous: write \-")
        elif token == "]" and before == "[^":
            new[-1], inside = "(?s:.)", ""
        elif token == "]" and before == "[":
            raise ValueError("an empty class")
        elif token.startswith("(?") and not re.match(r"\(\?(?:[:=!]|<.)", token):
            raise ValueError(f"{token} is no group of ECMA-262")
        else:
            new.append(_DOT if token == "." and not inside else token)
            if token == "]" or not inside:
                inside = token if token[0] == "[" else ""
        before = token
    return "".join(new)


def _escape(token: str, inside: str) -> str:
    letter, rest = token[1:2], token[2:]
    if letter == "s":
        return _WHITE if inside else f"[{_WHITE}]"
    if letter == "S":
        return f"[^{_WHITE}]"
    if letter == "u" and rest[4:6] == "\\u":  # two halves of a character
        return rf"\x{{{0x10000 + ((int(rest[:4], 16) & 0x3FF) << 10) + (int(rest[6:], 16) & 0x3FF):X}}}"
    if letter in "<>":
        return letter
    code = _CODES.get(letter, -1) if letter != "b" or inside else -1
    if letter == "c" and rest:
        code = ord(rest) % 32
    elif letter in "ux" and rest:
        code = int(rest.strip("{}"), 16)
    if code >= 0:
        # As itself where it must come: what cannot be spelled, `CONTROL` has to find. The engine would leave it out.
        return chr(code) if inside != "[^" and CONTROL.match(chr(code)) else rf"\x{{{code:X}}}"
    if letter.isascii() and (letter in "dDwWtnrfbBk123456789" or not letter.isalnum() or (letter in "pP" and rest)):
        return token
    raise ValueError(f"{token} has no meaning in ECMA-262")
