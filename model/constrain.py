"""Constrained decoding: which tokens may come next so that a reply fits a JSON Schema, a grammar or an expression.

The grammar's work is llguidance's (docs/decisions/0009-constrained-decoding.md). Nothing is let through that it cannot
keep: a keyword it does not know how to enforce makes the schema an error instead of an approximation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import InputError, ModelError
from .json_schema import CONTROL, ROOT, overlapping, parts, rewritten, strings
from .json_text import Limits, parse
from .panics import panics_told

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

    from .sequence import Drafter
    from .tokenizer import Tokenizer

# What no schema or grammar of a reply reaches, and the parser's library takes: a chain of 3,000 rules or references
# overflows its stack, at which the process dies; 200,000 alternatives take 350 MB.
SCHEMA = Limits(nbytes=2**20, entries=25_000)
MAX_GRAMMAR = 2**17  # bytes
MAX_RULES = 1_000  # of a grammar, and references of a schema
MAX_PROBES = 2_016  # pairs of cases of oneOf that are compared, a thousandth of a second each: of 64 cases
STUCK = "{} leaves nothing that could come next: the reply cannot be completed"
GRAMMAR_FORM = "give rules in Lark's form (start: ...) or in GBNF (root ::= ...)"
# A terminal takes all it can. If it takes what must follow it, no text of the grammar ends, and the library, which
# looks how far a text goes on without a choice, never returns. So in grammars it is told not to look. In JSON a part
# ends in a mark that no part holds, and an expression is one terminal.
NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
MOST_PIECES = 256  # tokens that begin one text, at most: more are a choice
MOST_BYTES = 8  # of a token in a text without a choice, on average
# Between two parts of the JSON: one space, or a new line with its indentation. Without a bound a model that likes
# white space would write nothing else, and a greedy one for ever.
WHITE_SPACE = r"(\x20|\n\x20{0,32})"
MOST_BLANKS = 64  # more than WHITE_SPACE has characters
ESCAPES = 'nrbtf"\\'  # in strings


def read_schema(text: str, name: str) -> dict[str, Any]:
    """A JSON Schema from its text; `InputError` names what is wrong with it, or what in it cannot be enforced."""
    try:
        schema = parse(text.encode(), SCHEMA)
    except ValueError as error:
        raise InputError(f"{name} {error}", 'give a JSON Schema, such as {"type": "object"}') from None
    if not isinstance(schema, dict):
        raise InputError(f"{name} is no JSON Schema: it must be an object", 'such as {"type": "object"}')
    check_schema(schema, name)
    return schema


def check_schema(schema: Mapping[str, Any], name: str = "the schema") -> None:
    """`InputError` if the schema is wrong, contradicts itself, or has a keyword that cannot be enforced."""
    _grammar(schema, name)


def read_grammar(text: str, name: str) -> str:
    """A grammar as `GrammarMask` takes it, from Lark's form as llguidance has it, or llama.cpp's GBNF; `InputError`."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    rules = text.replace("::=", ":").count(":")
    if len(text) > MAX_GRAMMAR or rules > MAX_RULES:
        raise InputError(
            f"{name} has {len(text)} characters and about {rules} rules, too many", "give a smaller grammar"
        )
    try:
        lark: str = any_to_lark(text)
    except Exception as error:  # it has no class of its own for all of them
        raise InputError(f"{name}: {' '.join(str(error).split())}", GRAMMAR_FORM) from None
    grammar: str = LLMatcher.grammar_from_lark(lark + NO_FORCING)
    _fault(LLMatcher.validate_grammar(grammar), name, GRAMMAR_FORM)
    return grammar


def read_regex(expression: str, name: str) -> str:
    """A regular expression that must match the whole text, as `GrammarMask` takes it; `InputError`."""
    from llguidance import LLMatcher

    grammar: str = LLMatcher.grammar_from_regex(expression)
    _fault(LLMatcher.validate_grammar(grammar), name, "Rust's form of expressions is meant, without looking around")
    return grammar


class GrammarMask:
    """A `LogitsMask` that keeps each row's text a beginning of one that fits; `complete` is its `Stopper`.

    An id that ends a reply is let through only where the text is whole.
    """

    name = "the grammar"

    def __init__(self, grammar: str, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: the network's, which may have more ids than the tokenizer has tokens."""
        self._grammar = grammar
        self._vocabulary = _vocabulary(tokenizer, vocab_size)
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}
        self._row(0)

    def __call__(self, row: int, ids: Sequence[int], logits: Tensor) -> Tensor:
        """See `LogitsMask`. `InputError` if nothing could come next."""
        allowed = self._row(row).read(ids).allowed()
        if not allowed.any():
            raise InputError(STUCK.format(self.name), "change it, or try another --seed")
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def leads_on(self, row: int, ids: Sequence[int]) -> bool:
        """See `LooksAhead`: whether something fits behind the newest token."""
        state = self._row(row).read(ids)
        for _ in range(MOST_BLANKS):
            if state.stopped:
                return not state.failed
            allowed = state.allowed()
            if (allowed & ~self._vocabulary.blank).any():
                return True
            if not allowed.any():
                return False
            # White space is allowed where the parser does not know yet that nothing could come behind it.
            ids = [*ids, int(allowed.nonzero()[0])]
            state = self._row(row).read(ids)
        return True

    def complete(self, row: int, ids: Sequence[int]) -> bool:
        """Whether the text is whole and nothing can follow it (see `Stopper`)."""
        state = self._row(row).read(ids)
        return state.stopped and not state.failed

    def forced(self, row: int, ids: Sequence[int], most: int) -> list[int]:
        """What the tokenizer makes of the text that must come next, as far as there is no choice; `most` ids of it."""
        return self._row(row).read(ids).forced(most)[:most]

    def _row(self, row: int) -> _Row:
        if row not in self._rows:
            self._rows[row] = _Row(self._vocabulary, self._grammar, self._vocab_size, self.name)
        return self._rows[row]


class SchemaMask(GrammarMask):
    """The same for JSON that fits a JSON Schema. `InputError` as `check_schema`."""

    name = "the schema"

    def __init__(self, schema: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int) -> None:
        super().__init__(_grammar(schema, self.name), tokenizer, vocab_size)


class ForcedDrafter:
    """A `Drafter` of what a mask leaves no choice about, and elsewhere of what another one drafts.

    The network reads such tokens in one step instead of one by one. It is still asked for each: the text is the same.
    """

    def __init__(self, mask: GrammarMask, prompt: int, otherwise: Drafter | None) -> None:
        """prompt: how many ids stand before the reply."""
        self._mask, self._prompt, self._otherwise = mask, prompt, otherwise
        self._forced = False

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """See `Drafter`."""
        forced = self._mask.forced(0, ids[self._prompt :], max(0, most))
        self._forced = bool(forced)
        if forced or self._otherwise is None:
            return forced
        return self._otherwise.draft(ids, most)

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """See `Drafter`."""
        if not self._forced and self._otherwise is not None:
            self._otherwise.learn(drafted, accepted, seconds)


class _Row:
    """The parser of one reply, and what it has read."""

    def __init__(self, vocabulary: _Vocabulary, grammar: str, vocab_size: int, name: str) -> None:
        self._vocabulary, self._grammar, self._vocab_size = vocabulary, grammar, vocab_size
        self._begin()
        _fault(self._matcher.get_error(), name)

    def _begin(self) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(self._vocabulary.tokens, self._grammar, log_level=0)
        self._read: list[int] = []
        self._allowed: Tensor | None = None  # behind what was read

    def read(self, ids: Sequence[int]) -> _Row:
        """Take in what is new since the last call; begin anew where something was taken back."""
        known = len(self._read)
        if len(ids) < known or self._read[-1:] != list(ids[known - 1 : known]):
            self._begin()
            known = 0
        new = list(ids[known:])
        if new:
            if not self.stopped:
                self._matcher.consume_tokens(new)
            self._read += new
            self._allowed = None
        return self

    def allowed(self) -> Tensor:
        """Which ids may come next, [vocab] bool; none in a dead end."""
        if self._allowed is None:
            self._allowed = _allowed(self._matcher, self._vocab_size)
        return self._allowed

    def forced(self, most: int) -> list[int]:
        """See `GrammarMask.forced`."""
        if self.stopped:
            return []
        if not self._grammar.endswith(NO_FORCING):
            return list(self._matcher.compute_ff_tokens())
        ahead, allowed, text = self._matcher.deep_copy(), self.allowed(), b""
        while len(text) < MOST_BYTES * most and not ahead.is_stopped():
            pieces = [(self._vocabulary.pieces[i], i) for i in allowed.nonzero().flatten()[:MOST_PIECES].tolist()]
            shortest, token = min(pieces, default=(b"", 0))
            if not shortest or not all(piece.startswith(shortest) for piece, _ in pieces):
                break
            text += shortest
            ahead.consume_token(token)
            allowed = _allowed(ahead, self._vocab_size)
        ids = self._vocabulary.tokens.tokenize_bytes(text)
        return list(ids if ahead.is_accepting() else ids[:-1])  # the last one may be another with what follows

    @property
    def stopped(self) -> bool:
        """Whether nothing more is read: the text is whole, or the parser has failed."""
        return bool(self._matcher.is_stopped())

    @property
    def failed(self) -> bool:
        """Whether the parser knows that what it read leads nowhere."""
        return bool(self._matcher.is_error())


class _Tokens:
    """The tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        # A special token writes nothing into the reply, so its spelling counts for nothing.
        self.tokens = [tokenizer.decode_bytes(i, skip_special_tokens=True) for i in range(vocab_size)]
        self.tokens.append(b"")  # stands for the end where the tokenizer has none; beyond every mask
        self.special_token_ids = [i for i, token in enumerate(self.tokens) if not token]
        self.eos_token_id = (*tokenizer.eos_token_ids, vocab_size)[0]
        self.bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        """What the tokenizer makes of a part that the schema leaves no choice about."""
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)


class _Vocabulary(NamedTuple):
    tokens: LLTokenizer
    pieces: list[bytes]  # of each id
    blank: Tensor  # which ids are white space, [vocab] bool


@lru_cache(maxsize=1)  # it takes a third of a second with 100,000 tokens
def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> _Vocabulary:
    import torch
    from llguidance import LLTokenizer, TokenizerWrapper

    tokens = _Tokens(tokenizer, vocab_size)
    with panics_told(_unfit):
        made = LLTokenizer(
            TokenizerWrapper(tokens),
            n_vocab=vocab_size + 1,
            eos_token=[*tokenizer.eos_token_ids] or [tokens.eos_token_id],
            slices=LLTokenizer.json_slices(),
        )
    blank = [bool(piece) and not piece.strip() for piece in tokens.tokens[:vocab_size]]
    return _Vocabulary(made, tokens.tokens, torch.tensor(blank))


def _allowed(matcher: LLMatcher, vocab_size: int) -> Tensor:
    """Which ids may come next, [vocab] bool; none in a dead end."""
    import numpy as np
    import torch

    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    if matcher.is_error():  # it finds out when it looks for a token
        bits = np.zeros_like(bits)
    return torch.from_numpy(np.unpackbits(bits, count=vocab_size, bitorder="little")).bool()


def _unfit(why: str) -> ModelError:
    return ModelError(f"this tokenizer's tokens cannot be kept to a grammar: {why}", "leave the schema or grammar out")


def _grammar(schema: Mapping[str, Any], name: str) -> str:
    from llguidance import LLMatcher

    ready = rewritten(schema, name)
    if (references := sum("$ref" in part for part in parts(ready))) > MAX_RULES:
        raise InputError(f"{name} has {references} references, too many", "flatten it")
    for part in parts(ready):
        least, named = part.get("minProperties"), part.get("required")
        if isinstance(least, int | float) and least > max(1, len(named) if isinstance(named, list) else 0):
            raise InputError(f"{name}: minProperties cannot be enforced: a name could come twice", "use `required`")
    grammar = _compiled(ready, name, _escapes(ready, name))
    _fault(LLMatcher.validate_grammar(grammar), name)
    probes = count(1)

    def is_empty(probe: dict[str, Any]) -> bool:
        if next(probes) > MAX_PROBES:
            raise InputError(f"{name}: oneOf has too many cases to compare each with each", "use enum or anyOf")
        return _is_empty(probe, name)

    if cases := overlapping(ready, is_empty):
        told = " and ".join(str(case + 1) for case in cases)
        raise InputError(f"{name}: cases {told} of oneOf may both fit one value", "make them differ, or use anyOf")
    return grammar


def _compiled(schema: dict[str, Any], name: str, escapes: str) -> str:
    from llguidance import LLMatcher

    # oneOf as anyOf: that only one case fits is checked apart, and through references too.
    options: Any = {"whitespace_pattern": WHITE_SPACE, "coerce_one_of": True, "json_allowed_escapes": escapes}
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        _fault(str(error), name)
        raise
    return grammar


def _is_empty(schema: dict[str, Any], name: str) -> bool:
    from llguidance import LLMatcher

    return LLMatcher.validate_grammar(_compiled(schema, name, ESCAPES)).startswith("Unsatisfiable schema")


def _escapes(schema: Mapping[str, Any], name: str) -> str:
    """Which escapes strings may have. Without \\u no name can be spelled in two ways, and so come twice."""
    if not any(map(CONTROL.search, strings(schema))):
        return ESCAPES
    for part in parts(schema):
        listed = part.get("properties") or part.get("required")
        if listed and (part.get("additionalProperties") is not False or part.get("patternProperties")):
            fault = f"{name}: control characters cannot be kept beside properties that are not listed"
            raise InputError(fault, "set additionalProperties to false, or leave the characters out")
    return ESCAPES + "u"


def _fault(message: str, name: str, hint: str = "change the schema: what cannot be enforced is not ignored") -> None:
    if message:
        message = " ".join(message.partition("<backtrace>")[0].split()).replace(f"json-schema:///#/$defs/{ROOT}", "#")
        short = message if len(message) <= 200 else message[:200] + " ..."
        raise InputError(f"{name}: {short}", hint)
