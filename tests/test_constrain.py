"""Constrained decoding: whatever a model would like to say, what comes out fits the schema, as jsonschema judges."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from model import constrain
from model.bpe import BYTE_OF_CHARACTER, GPT2_PATTERN, AddedToken, Vocabulary, cl100k_vocabulary
from model.constrain import (
    SCHEMA,
    ForcedDrafter,
    GrammarMask,
    SchemaMask,
    check_schema,
    read_grammar,
    read_regex,
    read_schema,
)
from model.errors import InputError, ModelError
from model.tokenizer import Tokenizer

torch.set_num_threads(1)

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ab"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "recursion": TREE,
    "enum of all types": {"enum": ["x", 1, 2.5, None, True, {"a": [1]}, "été 🎉", ""]},
    "const": {"const": {"k": ["ü", {"n": -1.5e3}], "quote\"and\\": "\n\t\u0001"}},
    "integers": {"type": "array", "items": {"type": "integer", "minimum": -7, "maximum": 1999}, "minItems": 1,
                 "maxItems": 4},
    "exclusive bounds": {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 1.5},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 1000},
    "number": {"type": "number"},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
    "pattern without anchors": {"type": "string", "pattern": "b[ae]d", "maxLength": 9},
    "pattern of letters": {"type": "string", "pattern": "^[é-ü]{1,3}$"},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False,
              "minItems": 2},
    "map": {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9}, "minProperties": 1,
            "maxProperties": 2},
    "names by pattern": {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
                         "additionalProperties": False},
    "open object": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                    "additionalProperties": {"type": "boolean"}},
    "any of": {"anyOf": [{"type": "integer"}, PERSON, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    "one of, disjoint": {"oneOf": [{"type": "integer", "maximum": 99}, {"type": "boolean"}]},
    "several types": {"type": ["null", "boolean", "integer"]},
    "unicode names": {"type": "object", "properties": {"größe": {"type": "integer"}, "名": {"const": "値"}},
                      "required": ["größe", "名"], "additionalProperties": False},
    "dates": {"type": "string", "format": "date"},
    "nested": {"type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 2, "items": PERSON}},
    "deep objects": {"type": "object", "required": ["a"], "additionalProperties": False, "properties": {
        "a": {"type": "object", "required": ["b"], "additionalProperties": False, "properties": {
            "b": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "maxItems": 2}}}}},
    "anything": {},
    "definitions of an older draft": {"definitions": {"p": {"type": "integer", "maximum": 5}}, "type": "array",
                                      "items": {"$ref": "#/definitions/p"}, "maxItems": 3},
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"type": "nope"}, "nope"),
    "keyword that cannot be enforced": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "negation": ({"not": {"type": "string"}}, "not"),
    "condition": ({"if": {}, "then": {}}, "if"),
    "unknown format": ({"type": "string", "format": "int32"}, "int32"),
    "reference into nothing": ({"$ref": "#/nope"}, "/nope"),
    "reference into the network": ({"$ref": "http://localhost/x"}, "localhost"),
    "pattern that looks ahead": ({"pattern": "(?=a)"}, "look-ahead"),
    "pattern that is none": ({"pattern": "("}, "regex"),
    "contradiction": ({"type": "array", "minItems": 3, "maxItems": 1}, "minItems"),
    "nothing allowed": ({"enum": []}, "Unsatisfiable"),
    "one of that overlap": ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "oneOf"),
    "names that could come twice": ({"type": "object", "minProperties": 2}, "minProperties"),
    "as many, written as a fraction": ({"type": "object", "minProperties": 2.0}, "minProperties"),
    "bounds that are no numbers": ({"type": "integer", "minimum": "3"}, "minimum"),
    "properties that are no object": ({"properties": []}, ""),
}


@cache
def dbrx() -> Tokenizer:
    """DBRX's own: 100,280 ids, some without a token; the network has 100,352."""
    return Tokenizer(cl100k_vocabulary())


@cache
def small() -> Tokenizer:
    """Bytes and a few pieces of JSON, with ids that have no token, a special token that spells JSON, and two ends."""
    pieces = [bytes([byte]) for byte in BYTE_OF_CHARACTER.values()]
    pieces += [b'{"', b'": ', b'", "', b'"}', b"true", b"null", b"  ", b"\n\n", b" \n ", b'"name', b"}]", b"-1"]
    ids = {piece: 3 + 2 * i for i, piece in enumerate(pieces)}
    ends = {"<end>": AddedToken(0), "<stop>": AddedToken(2), "[1]": AddedToken(1000)}
    return Tokenizer(Vocabulary(GPT2_PATTERN, pieces[:256], ids, ends), eos_token_ids=(0, 2))


VOCABULARIES: dict[str, tuple[Callable[[], Tokenizer], int]] = {"small": (small, 1003), "dbrx": (dbrx, 100352)}


@pytest.fixture(scope="module", autouse=True)
def _tables_of_both() -> Iterator[None]:
    """A program has one tokenizer, and keeps one table; these tests go to and fro."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constrain, "_vocabulary", cache(constrain._vocabulary.__wrapped__))
        yield


@cache
def tokens_of(vocabulary: str) -> list[bytes]:
    """The token of every id; the ids that end a reply have b""."""
    make, vocab_size = VOCABULARIES[vocabulary]
    return [make().decode_bytes(i, skip_special_tokens=True) for i in range(vocab_size)]


@cache
def ids_that(test: Callable[[bytes], bool], vocabulary: str) -> torch.Tensor:
    """Which ids have such a token, [vocab] bool."""
    return torch.tensor([test(token) for token in tokens_of(vocabulary)])


def one_of(allowed: torch.Tensor, rng: random.Random) -> int:
    """An id where allowed [vocab] is true."""
    ids = allowed.nonzero().flatten()
    return int(ids[rng.randrange(len(ids))])  # a list of them would have up to 100,000 ids


def is_blank(token: bytes) -> bool:
    return bool(token) and not token.strip()


def ends_a_part(token: bytes) -> bool:
    return token[:1] in b'"}],'


def write(
    schema: dict[str, Any],
    vocabulary: str,
    seed: int,
    limit: int = 400,
    taste: Callable[[bytes], bool] = ends_a_part,
) -> str | None:
    """What a model of random taste says under the constraint; None if it has not ended after `limit` tokens.

    taste: tokens that it takes half of the time where it may. Of thousands of tokens that go on with a string, few end
    it: without a push no reply would ever end.
    """
    make, vocab_size = VOCABULARIES[vocabulary]
    tokenizer, rng = make(), random.Random(seed)
    mask, ids, likes = SchemaMask(schema, tokenizer, vocab_size), list[int](), ids_that(taste, vocabulary)
    scores = torch.zeros(vocab_size)
    while len(ids) < limit:
        allowed = mask(0, ids, scores).isfinite()
        liked = allowed & likes
        choice = liked if liked.any() and rng.random() < 0.5 else allowed
        ids.append(one_of(choice, rng))
        while not mask.leads_on(0, ids):  # as decoding does
            allowed[ids.pop()] = False
            ids.append(one_of(allowed, rng))
        if ids[-1] in tokenizer.eos_token_ids:
            return tokenizer.decode(ids[:-1])
        assert tokenizer.decode_bytes(ids[-1], skip_special_tokens=True)
        if mask.complete(0, ids):
            return tokenizer.decode(ids)
    return None


def assert_fits(schema: dict[str, Any], text: str) -> None:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs if name in schema.get("properties", ())]
        assert len(set(names)) == len(names), text
        return dict(pairs)

    Draft202012Validator(schema).validate(json.loads(text, object_pairs_hook=once))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_what_comes_out_fits_the_schema(name: str, vocabulary: str) -> None:
    schema = SCHEMAS[name]
    texts = [write(schema, vocabulary, seed) for seed in range(6 if vocabulary == "small" else 2)]
    for text in filter(None, texts):
        assert_fits(schema, text)
    assert any(texts), "no reply ended"


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_comes_out_fits_the_schema_many_times(name: str) -> None:
    for seed in range(400):
        text = write(SCHEMAS[name], "small" if seed % 4 else "dbrx", seed + 1000)
        if text is not None:
            assert_fits(SCHEMAS[name], text)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_taste_for_white_space_does_not_keep_the_reply_from_ending(vocabulary: str) -> None:
    text = write(PERSON, vocabulary, 1, taste=is_blank)
    assert text is not None and "\n" in text
    assert_fits(PERSON, text)


def test_a_special_tokens_spelling_is_no_way_in() -> None:
    mask = SchemaMask({"const": [1]}, small(), 1003)
    scores = mask(0, [], torch.zeros(1003))
    assert scores[1000].isinf() and scores.isfinite().any()


def test_ids_beyond_the_tokenizer_are_never_allowed() -> None:
    mask = SchemaMask({}, dbrx(), 100352)
    scores = mask(0, [], torch.zeros(100352))
    assert len(scores) == 100352 and scores[dbrx().vocab_size :].isinf().all()


def test_the_end_is_allowed_only_where_the_json_is_whole() -> None:
    tokenizer = small()
    ids = {tokenizer.decode_bytes(i): i for i in range(1003)}
    mask, reply = SchemaMask({"type": "integer", "maximum": 99}, tokenizer, 1003), list[int]()
    for text, may_end, complete in ((b"", False, False), (b"1", True, False), (b"2", True, True)):
        reply += [ids[text]] if text else []
        scores = mask(0, reply, torch.zeros(1003))
        assert scores[[0, 2]].isfinite().tolist() == [may_end] * 2
        assert mask.complete(0, reply) is complete


def test_rows_are_apart_and_a_reply_may_be_taken_up() -> None:
    tokenizer = small()
    schema = {"enum": ["ab", "cd"]}
    together, alone = SchemaMask(schema, tokenizer, 1003), SchemaMask(schema, tokenizer, 1003)
    rows = [tokenizer.encode('"a'), tokenizer.encode('"c')]
    for row, ids in enumerate(rows):
        for length in range(3):
            together(row, ids[:length], torch.zeros(1003))
    for row, ids in enumerate(rows):
        assert torch.equal(together(row, ids, torch.zeros(1003)), alone(row, ids, torch.zeros(1003)))


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = Tokenizer(Vocabulary(GPT2_PATTERN, *_bytes()))
    assert tokenizer.eos_token_ids == ()
    mask = SchemaMask({"type": "boolean"}, tokenizer, 256)
    ids = tokenizer.encode("true")
    assert mask(0, ids[:-1], torch.zeros(256)).isfinite().sum() == 1
    assert mask.complete(0, ids)


GRAMMARS = {
    "lark": (
        'start: "{" KEY ": " /[0-9]{1,3}/ "}"\nKEY: "\\"the number of people\\""',
        r'\{"the number of people": \d{1,3}\}',
    ),
    "gbnf": ('root ::= "It is " ("hot" | "cold") "."', r"It is (hot|cold)\."),
}


@pytest.mark.parametrize("name", [*GRAMMARS, "regex"])
def test_a_grammar_or_an_expression_is_kept_and_what_it_forces_is_drafted(name: str) -> None:
    """A model that takes any token that is allowed; Python's `re` judges the whole text."""
    expression = "(yes|no), it is certainly so in [A-Z][a-z]{1,5}\\."
    text, judge = GRAMMARS.get(name, ("", expression))
    grammar = read_regex(expression, "--regex") if name == "regex" else read_grammar(text, "g")
    tokenizer, steps, tokens = dbrx(), 0, 0
    for seed in range(5):
        mask, ids = GrammarMask(grammar, tokenizer, 100352), list[int]()
        drafter = ForcedDrafter(mask, 1, None)
        chance = random.Random(seed)
        while not mask.complete(0, ids):
            drafted = drafter.draft([7, *ids], 50)
            steps += 1
            for token in drafted:  # each is allowed where it stands
                assert mask(0, ids, torch.zeros(100352))[token].isfinite()
                ids.append(token)
            if mask.complete(0, ids):
                break
            allowed = mask(0, ids, torch.zeros(100352)).isfinite().nonzero().flatten().tolist()
            ids.append(chance.choice(allowed))
        tokens += len(ids)
        assert re.fullmatch(judge, tokenizer.decode(ids, skip_special_tokens=True))
    assert steps < tokens * 0.9


@pytest.mark.parametrize("own", ["", '%llguidance {"no_forcing": false}\n'])
def test_the_library_never_looks_ahead_in_a_grammar(own: str) -> None:
    """Where no text of a grammar ends it would look for ever. What is forced is found by a walk with an end."""
    mask = GrammarMask(read_grammar(own + 'start: "' + 200 * "no choice " + '"', "g"), dbrx(), 100352)
    assert mask._row(0)._matcher.compute_ff_tokens() == []
    forced = mask.forced(0, [], 12)
    assert forced == dbrx().encode(200 * "no choice ")[:12]
    assert mask.forced(0, forced, 3) == dbrx().encode(200 * "no choice ")[12:15]


def test_a_look_behind_white_space_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = GrammarMask(read_regex(" {5000}a", "--regex"), dbrx(), 100352)
    reads: list[int] = []
    read = type(mask._row(0)).read
    monkeypatch.setattr(type(mask._row(0)), "read", lambda row, ids: reads.append(len(ids)) or read(row, ids))
    assert mask.leads_on(0, dbrx().encode(" "))
    assert len(reads) < 100


@pytest.mark.parametrize("text", ["start: nothing", "root ::= (", "start: /(/", "", "hello there"])
def test_a_wrong_grammar_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^g\.lark: ") as caught:
        read_grammar(text, "g.lark")
    assert "\n" not in caught.value.one_line and "Lark" in caught.value.one_line


def test_a_wrong_expression_is_refused_in_one_line() -> None:
    for expression in ("(a", "a(?=b)", r"\1"):
        with pytest.raises(InputError, match=r"^--regex: ") as caught:
            read_regex(expression, "--regex")
        assert "\n" not in caught.value.one_line


def _bytes() -> tuple[list[bytes], dict[bytes, int]]:
    single = [bytes([byte]) for byte in range(256)]
    return single, {byte: byte[0] for byte in single}


@pytest.mark.parametrize("name", BAD)
def test_a_schema_that_cannot_be_kept_is_refused(name: str) -> None:
    schema, word = BAD[name]
    with pytest.raises(InputError) as caught:
        check_schema(schema, "schema.json")
    assert "\n" not in caught.value.one_line and caught.value.message.startswith("schema.json: ")
    assert word in caught.value.message and caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "true", '"x"', "nul", "[" * 100_000, '{"a": NaN}', '{"type": "nope"}'])
def test_what_is_no_schema_is_refused(text: str) -> None:
    if text == '{"a": NaN}':  # an unknown keyword is no fault, and Python reads more than JSON
        read_schema(text, "schema.json")
        return
    with pytest.raises(InputError, match=r"schema\.json"):
        read_schema(text, "schema.json")
    assert SCHEMA.nbytes > len(text)


def test_options_of_the_library_in_a_schema_are_ignored() -> None:
    schema = {"x-guidance": {"lenient": True, "item_separator": "x"}, "uniqueItems": True, "type": "array"}
    with pytest.raises(InputError, match="uniqueItems"):
        check_schema(schema)


def test_a_property_named_like_a_keyword_is_none() -> None:
    check_schema({"type": "object", "properties": {"minProperties": {"type": "integer"}}})


@pytest.mark.bench
def test_time_of_a_mask() -> None:
    """Median and 95th percentile of a mask over 100,352 ids; what decoding waits for at each token."""
    import statistics
    import time

    times, logits = list[float](), torch.zeros(100352)
    for seed in range(5):
        rng = random.Random(seed)
        mask, ids = SchemaMask(SCHEMAS["nested"], dbrx(), 100352), list[int]()
        for _ in range(60):
            start = time.perf_counter()
            scores = mask(0, ids, logits)
            times.append(time.perf_counter() - start)
            ids.append(rng.choice(scores.isfinite().nonzero().flatten().tolist()))
            if mask.complete(0, ids):
                break
    micro = [t * 1e6 for t in sorted(times)]
    late = micro[int(len(micro) * 0.95)]
    print(f"\nmask: median {statistics.median(micro):.0f} us, p95 {late:.0f} us, {len(micro)} masks")
    assert statistics.median(micro) < 3000


def test_a_panic_of_the_parser_is_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Its tree of tokens takes no token of thousands of bytes."""
    long = [b"a" * 2**i for i in range(1, 12)]
    pieces = [bytes([byte]) for byte in BYTE_OF_CHARACTER.values()] + long
    tokenizer = Tokenizer(Vocabulary(GPT2_PATTERN, pieces, {piece: i for i, piece in enumerate(pieces)}))
    with pytest.raises(ModelError, match="tokens cannot be kept to a grammar: assertion failed"):
        GrammarMask(read_regex("a+", "--regex"), tokenizer, len(pieces))
    assert capfd.readouterr().err == ""


def chain(link: Callable[[int], Any], length: int) -> str:
    links = {f"d{i}": link(i + 1) for i in range(length)}
    return json.dumps({"$defs": links | {f"d{length}": {"type": "integer"}}, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (chain(lambda i: {"$ref": f"#/$defs/d{i}"}, 300), "nested too deeply"),
        (chain(lambda i: {"properties": {"a": {"$ref": f"#/$defs/d{i}"}}}, 3000), "3002 references"),
        (json.dumps({"enum": list(range(100_000))}), "entries"),
        (json.dumps({"oneOf": [{"type": "object", "maxProperties": 0}] * 99}), "cases 1 and 2"),
    ],
)
def test_a_schema_that_would_cost_much_is_refused_soon(text: str, message: str) -> None:
    """A chain of 3,000 references overflows the parser's stack, and the process dies."""
    with pytest.raises(InputError, match=message):
        read_schema(text, "schema.json")


def test_cases_are_compared_only_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.constrain.MAX_PROBES", 9)
    cases = [{"type": "integer", "minimum": i, "maximum": i} for i in range(5)]
    check_schema({"oneOf": cases[:4]})
    with pytest.raises(InputError, match="too many cases"):
        check_schema({"oneOf": cases})


def test_constants_are_compared_at_once() -> None:
    read_schema(json.dumps({"oneOf": [{"const": i} for i in range(500)]}), "schema.json")


@pytest.mark.parametrize("text", ["".join(f"r{i}: r{i + 1}\n" for i in range(3000)), 'start: "a"' + ' | "a"' * 200_000])
def test_a_grammar_that_would_cost_much_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"g\.lark has .* too many"):
        read_grammar(text, "g.lark")
