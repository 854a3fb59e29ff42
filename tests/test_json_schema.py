r"""What an accepted schema means: ECMA-262's patterns, the calendar's days, exact numbers, cases behind references.

Answers come from jsonschema, from `datetime`, and from a JavaScript engine (tests/reference/patterns.js writes the
table tests/data/ecma_patterns.json; under the marker `reference` it is asked anew, with ajv beside it).
"""

from __future__ import annotations

import calendar
import datetime
import itertools
import json
import shutil
import subprocess
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from model.bpe import GPT2_PATTERN, AddedToken, Vocabulary
from model.constrain import SchemaMask, check_schema
from model.errors import InputError
from model.json_schema import engine_pattern
from model.tokenizer import Tokenizer

END = 256
TABLE = Path(__file__).parent / "data" / "ecma_patterns.json"
SCRIPT = Path(__file__).parent / "reference" / "patterns.js"


@cache
def letters() -> Tokenizer:
    """A token a byte, and an end."""
    single = [bytes([byte]) for byte in range(END)]
    ids = {byte: byte[0] for byte in single}
    return Tokenizer(Vocabulary(GPT2_PATTERN, single, ids, {"<end>": AddedToken(END)}), eos_token_ids=(END,))


@lru_cache(maxsize=1)
def mask_of(schema: str) -> tuple[SchemaMask, itertools.count[int]]:
    """A mask, and the numbers of rows that it has not seen: one for each text."""
    return SchemaMask(json.loads(schema), letters(), END + 1), itertools.count()


def takes(schema: dict[str, Any], text: str) -> bool:
    """Whether a reply may be this text."""
    mask, rows = mask_of(json.dumps(schema))
    row, ids, nothing = next(rows), [*text.encode(), END], torch.zeros(END + 1)
    for length, token in enumerate(ids):
        if token == END and mask.complete(row, ids[:length]):
            return True
        if not mask(row, ids[:length], nothing)[token].isfinite() or not mask.leads_on(row, ids[: length + 1]):
            return False
    return True


def takes_value(schema: dict[str, Any], value: Any) -> bool:
    return takes(schema, json.dumps(value, ensure_ascii=False))


# Patterns


@pytest.mark.parametrize("share", [12, pytest.param(1, marks=pytest.mark.reference)])
def test_patterns_are_read_as_javascript_reads_them(share: int) -> None:
    """None in the table: JavaScript refuses the pattern, so it is not taken here either.

    share: every how many texts are looked at, to save seconds; and the first two of those that match.
    """
    for number, (pattern, answers) in enumerate(json.loads(TABLE.read_text("utf-8")).items()):
        schema = {"type": "string", "pattern": pattern}
        if answers is None:
            with pytest.raises(InputError):
                check_schema(schema)
        else:
            matching = [text for text, expected in answers.items() if expected]
            for text in {*matching[:2], *list(answers)[number % share :: share]}:
                expected = answers[text]
                assert takes_value(schema, text) is expected, (pattern, text)


@pytest.mark.reference
def test_the_table_of_patterns_is_javascripts() -> None:
    node = shutil.which("node")
    assert node, "needs Node.js"
    made = subprocess.run([node, SCRIPT], capture_output=True, text=True, check=True).stdout
    assert json.loads(made) == json.loads(TABLE.read_text("utf-8"))


@pytest.mark.parametrize(
    "pattern",
    [r"^\A", r"\z", r"\Qa\E", "(?i)a", "(?P<n>a)", "(?x) a", r"\a", "[]a]", r"\u12", r"\x1", r"\pL", "[a--b]"],
)
def test_what_only_the_engine_knows_is_no_pattern(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"class|group|meaning"):
        engine_pattern(pattern)


# Formats


def test_days_are_those_of_the_calendar() -> None:
    date, moment = ({"type": "string", "format": format} for format in ("date", "date-time"))
    for year in (1, 4, 1900, 2000, 2023, 9999):
        for month, day in ((2, 28), (2, 29), (2, 30), (4, 30), (4, 31), (12, 31), (1, 0), (13, 1)):
            text = f"{year:04}-{month:02}-{day:02}"
            try:
                real = bool(datetime.date.fromisoformat(text))
            except ValueError:
                real = False
            assert takes_value(date, text) is real, text
            assert real or not takes_value(moment, text + "T10:00:00Z")
    assert calendar.isleap(2024) and takes_value(moment, "2024-02-29T23:59:59.5+01:00")
    assert not takes_value(date, "0000-01-01") and not takes_value(moment, "2024-01-01T12:30:60Z")


def test_other_rules_beside_a_format_hold() -> None:
    schema = {"type": "string", "format": "date", "pattern": "^2", "allOf": [{"maxLength": 10}]}
    assert takes_value(schema, "2024-02-29") and not takes_value(schema, "1999-02-28")


# Numbers


@pytest.mark.parametrize(
    "schema",
    [{"const": 12345678901234567890}, {"const": 2**53 + 1}, {"enum": [1, -(2**60)]}, {"const": {"a": [10**20]}},
     {"const": 1e300}, {"const": float("inf")}, {"minimum": 2**53 + 1}, {"maximum": -1e20}, {"multipleOf": 10**20},
     {"properties": {"a": {"exclusiveMinimum": 1e17}}}, {"oneOf": [{"const": 2**64}, {"type": "null"}]}],
    ids=str,
)  # fmt: skip
def test_numbers_that_would_become_others_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"2\^53"):
        check_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [{"exclusiveMinimum": 0, "maximum": 0.5}, {"exclusiveMinimum": 0.0, "exclusiveMaximum": 0.01},
     {"exclusiveMaximum": 0, "minimum": -0.5}, {"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.05}]},
     {"exclusiveMinimum": 0, "anyOf": [{"type": "null"}, {"$ref": "#/$defs/small"}]},
     {"oneOf": [{"const": 0}, {"exclusiveMinimum": 0, "$ref": "#/$defs/small"}]}],
    ids=str,
)  # fmt: skip
def test_a_fraction_above_0_is_refused(schema: dict[str, Any]) -> None:
    """The engine's grammar of such a range takes 0 itself."""
    with pytest.raises(InputError, match=r"exclusiveM\w+ 0 cannot be kept") as fault:
        check_schema({"type": ["number", "null"], **schema, "$defs": {"small": {"maximum": 0.5}}})
    assert "0.0001" in fault.value.hint


@pytest.mark.parametrize(
    "schema",
    [{"exclusiveMinimum": 0, "maximum": 1}, {"exclusiveMinimum": 0}, {"exclusiveMaximum": 0, "minimum": -1.5},
     {"minimum": 0.0001, "maximum": 0.5}, {"anyOf": [{"exclusiveMinimum": 0}, {"maximum": -0.5}]}],
    ids=str,
)  # fmt: skip
def test_other_ranges_at_0_are_kept(schema: dict[str, Any]) -> None:
    schema = {"type": "number", **schema}
    for text in ("0", "-0", "0.0", "-0.0", "0.1", "-0.1", "0.5", "1", "-0.6", "-1.6"):
        assert takes(schema, text) is Draft202012Validator(schema).is_valid(json.loads(text)), text


def test_bounds_that_no_number_reaches_are_kept() -> None:
    for bound in (1e20, 10**20, 2**63 - 1, 2**53 + 1):
        schema = {"type": "integer", "minimum": -bound, "maximum": bound, "default": 10**30}
        for value in (0, 2**53, -(2**53)):
            assert takes_value(schema, value) and Draft202012Validator(schema).is_valid(value)
        assert not takes_value(schema, int(bound) * 10)
    assert takes_value({"type": "string", "maxLength": 10**20, "minLength": 1.0}, "a")
    assert takes_value(
        {"const": {"minimum": 3, "minProperties": 9, "pattern": "("}},
        {"minimum": 3, "minProperties": 9, "pattern": "("},
    )


# Names


def test_a_name_cannot_come_twice_through_an_escape() -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"},
              "patternProperties": {"^x": {"type": "null"}}, "type": "object"}  # fmt: skip
    for text in ('{"a": 1, "b": "x"}', '{"xy": null}', '{"b\\n": "\\t"}'):
        assert takes(schema, text) and Draft202012Validator(schema).is_valid(json.loads(text))
    for text in (
        r'{"a": 1, "\u0061": "x"}',
        r'{"\u0061": "x"}',
        r'{"\u0078y": "x"}',
        '{"a": 1, "a": 2}',
        r'{"a\/": "x"}',
    ):
        assert not takes(schema, text)


@pytest.mark.parametrize(
    "pattern",
    ["^a\x01b$", r"^a\x01b$", r"^a\u0001b$", r"^a\u{1}b$", r"^a\cAb$", r"^a[\u0001]b$", r"^a[\x00-\x02]b$"],
)
def test_control_characters_in_a_pattern_are_not_left_out(pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert takes(schema, r'"a\u0001b"')
    assert not takes(schema, '"ab"')


def test_control_characters_that_a_pattern_excludes_ask_for_nothing() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": r"^[^\x00-\x1f\x7f]+$"}}}
    assert takes(schema, '{"a": "b c"}') and not takes(schema, r'{"a": "\t"}')


def test_control_characters_are_spelled_where_no_name_is_free() -> None:
    schema = {"type": "object", "properties": {"a\x01": {"const": "\x02"}}, "required": ["a\x01"]}
    assert takes({**schema, "additionalProperties": False}, r'{"a\u0001": "\u0002"}')
    with pytest.raises(InputError, match="control characters"):
        check_schema(schema)


# oneOf


def case(tag: str) -> dict[str, Any]:
    properties = {"kind": {"const": tag}, "n": {"type": "integer", "maximum": 9}}
    return {"type": "object", "properties": properties, "required": ["kind"], "additionalProperties": False}


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


DEFS = {
        "Cat": case("cat"), "Dog": case("dog"), "Pet": ref("Cat"), "Also": {"allOf": [ref("Dog")]},
        "Any": {"anyOf": [ref("Cat"), {"type": "null"}]}, "a/b~c": case("slash"),
        "Tree": {"type": "object", "required": ["kind", "sub"], "additionalProperties": False,
                 "properties": {"kind": {"const": "tree"}, "sub": {"oneOf": [ref("Tree"), {"type": "null"}]}}},
}  # fmt: skip
CAT, DOG = {"kind": "cat"}, {"kind": "dog", "n": 1}
TREE = {"kind": "tree", "sub": {"kind": "tree", "sub": None}}
DISJOINT: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "inline": ({"oneOf": [case("cat"), case("dog")]}, [CAT, DOG]),
    "references": ({"oneOf": [ref("Cat"), ref("Dog")]}, [CAT, DOG]),
    "a reference or null": ({"oneOf": [ref("Cat"), {"type": "null"}]}, [CAT, None]),
    "references to references": ({"oneOf": [ref("Pet"), ref("Also")]}, [CAT, DOG]),
    "any of inside": ({"oneOf": [ref("Any"), ref("Dog")]}, [CAT, None, DOG]),
    "an escaped pointer": ({"oneOf": [ref("a~1b~0c"), ref("Dog")]}, [{"kind": "slash"}, DOG]),
    "recursion": ({"oneOf": [ref("Tree"), ref("Cat")]}, [TREE, CAT]),
    "deep inside": ({"type": "array", "items": {"oneOf": [ref("Cat"), ref("Dog")]}}, [[CAT, DOG]]),
    "older definitions": ({"definitions": DEFS, "oneOf": [{"$ref": "#/definitions/Cat"}, {"const": 1}]}, [CAT, 1]),
    "with an id": ({"$id": "https://example.org/s",
                    "oneOf": [ref("Cat"), {"$ref": "https://example.org/s#/$defs/Dog"}]}, [CAT, DOG]),
    "the whole itself": ({"oneOf": [{"type": "array", "items": {"$ref": "#"}, "maxItems": 2}, {"type": "null"}]},
                         [[None, []], None]),
    "ranges": ({"type": "integer", "oneOf": [{"maximum": 3}, {"minimum": 7, "maximum": 9}, {"minimum": 20}]},
               [1, 8, 20]),
    "ranges that touch": ({"type": "number", "oneOf": [{"maximum": 3}, {"exclusiveMinimum": 3}]}, [3, 3.5]),
    "lengths": ({"oneOf": [{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 3}]}, ["ab", "abc"]),
    "patterns": ({"type": "string", "oneOf": [{"pattern": "^a"}, {"pattern": "^b"}]}, ["a", "b"]),
    "counts": ({"type": "array", "oneOf": [{"maxItems": 1}, {"minItems": 2}]}, [[1], [1, 2]]),
    "constants": ({"oneOf": [{"const": {"a": 1}}, {"const": {"a": 2}}, {"enum": [1, 2]}]}, [{"a": 1}, 2]),
    "what stands around": ({"type": "object", "required": ["k"], "oneOf": [
        {"properties": {"k": {"const": 1}}}, {"properties": {"k": {"const": 2}}}]}, [{"k": 1}, {"k": 2}]),
}  # fmt: skip
OVERLAPPING: dict[str, dict[str, Any]] = {
    "the same": {"oneOf": [ref("Cat"), ref("Pet")]},
    "null twice": {"oneOf": [ref("Any"), {"type": "null"}]},
    "tags that are not required": {"oneOf": [{"properties": {"k": {"const": 1}}}, {"properties": {"k": {"const": 2}}}]},
    "ranges": {"type": "integer", "oneOf": [{"maximum": 3}, {"minimum": 3}]},
    "numbers and integers": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    "a constant in an enum": {"oneOf": [{"const": 1.0}, {"enum": [1, 2]}]},
    "the second pair": {"oneOf": [{"type": "null"}, {"type": "string"}, {"enum": ["a", 3]}]},
    "deep inside": {"properties": {"a": {"items": {"oneOf": [{}, ref("Cat")]}}}},
}


@pytest.mark.parametrize("name", DISJOINT)
def test_one_of_cases_that_exclude_each_other(name: str) -> None:
    schema, values = DISJOINT[name]
    schema = {"$defs": DEFS, **schema}
    for value in values:
        assert Draft202012Validator(schema).is_valid(value) and takes_value(schema, value), value


@pytest.mark.parametrize("name", OVERLAPPING)
def test_one_of_cases_that_overlap_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="of oneOf may both fit one value") as caught:
        check_schema({"$defs": DEFS, **OVERLAPPING[name]}, "s.json")
    assert caught.value.hint == "make them differ, or use anyOf"  # nothing but JSON Schema's own words


# Dead ends

INTEGER = {"type": "integer", "minimum": 0, "maximum": 9}
CLOSED = {"type": "object", "additionalProperties": False}
ONE = {**CLOSED, "properties": {"a": INTEGER}, "patternProperties": {"^a$": {}}}
EXHAUSTED: dict[str, dict[str, Any]] = {
    "the listed name itself": ONE,
    "several": {**CLOSED, "properties": dict.fromkeys("abc", INTEGER), "required": ["b"],
                "patternProperties": {"^[abc]$": {}}},
    "two patterns": {**CLOSED, "properties": {"a": INTEGER, "bb": INTEGER},
                     "patternProperties": {"^a$": {}, "^b{2}$": {}}},
    "through allOf": {"allOf": [{"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
                                {"patternProperties": {"^a$": {}}, "additionalProperties": False}]},
    "in an array": {"type": "array", "maxItems": 2, "items": ONE},
    "behind a reference": {"$defs": {"o": ONE}, "oneOf": [{"$ref": "#/$defs/o"}, {"type": "null"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", EXHAUSTED)
def test_no_token_is_taken_that_leads_into_a_dead_end(name: str) -> None:
    """Whatever is chosen among what is allowed and leads on, a whole reply comes of it."""
    from tests.test_constrain import write

    for seed in range(4):
        text = write(EXHAUSTED[name], "small", seed, limit=150)
        assert text is not None and Draft202012Validator(EXHAUSTED[name]).is_valid(json.loads(text))


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
ENDLESS: dict[str, dict[str, Any]] = {
    "an object": {"$ref": "#/$defs/node"},
    "the whole": {"type": "object", "properties": {"self": {"$ref": "#"}}, "required": ["self"]},
    "an array": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "required": {"type": "object", "properties": {"n": {"$ref": "#/$defs/node"}}, "required": ["n"]},
    "every case": {"anyOf": [{"$ref": "#/$defs/node"},
                             {"type": "array", "prefixItems": [{"$ref": "#/$defs/node"}], "minItems": 1}]},
    "a list of one type": {**NODE, "type": ["object"], "properties": {"next": {"$ref": "#"}}},
    "an array, a list of one type": {"type": ["array"], "items": {"$ref": "#"}, "minItems": 1.0},
    "parts that hold together": {"allOf": [{"type": "object"}, {"required": ["n"]},
                                           {"properties": {"n": {"$ref": "#"}}}]},
    "a type behind a reference": {"$ref": "#/$defs/kind", "properties": {"n": {"$ref": "#"}}, "required": ["n"]},
    "any name": {"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1},
    "a name of a pattern": {"type": "object", "patternProperties": {"^a": {"$ref": "#"}}, "additionalProperties": False,
                            "minProperties": 1},
    "a required name that is not listed": {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["a"]},
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_what_could_never_end_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"nothing fits|unsatisfiable"):
        check_schema({"$defs": {"node": NODE, "kind": {"type": "object"}}, **ENDLESS[name]})


def test_what_could_never_end_is_left_out_where_it_may() -> None:
    schema = {**CLOSED, "$defs": {"node": NODE}, "properties": {"a": INTEGER, "n": {"$ref": "#/$defs/node"}}}
    assert takes_value(schema, {"a": 1}) and not takes(schema, '{"n')
    ends = {**NODE, "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    assert takes_value({"$defs": {"node": ends}, "$ref": "#/$defs/node"}, {"next": {"next": None}})
    for schema, value in (
        ({"type": "object", "additionalProperties": {"$ref": "#"}}, {"a": {}}),
        ({"type": ["array", "null"], "items": {"$ref": "#"}, "minItems": 1}, [[None]]),
        ({**CLOSED, "properties": {"a": INTEGER, "n": {"$ref": "#"}}, "minProperties": 1}, {"a": 1}),
    ):
        assert takes_value(schema, value) and Draft202012Validator(schema).is_valid(value)


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(2000):
        schema = {"items": schema}
    with pytest.raises(InputError, match="nested too deeply"):
        check_schema(schema)
