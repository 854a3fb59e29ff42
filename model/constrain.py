"""Constrained decoding: which tokens may come next so that a reply is JSON that fits a JSON Schema.

The grammar's work is llguidance's (docs/decisions/0009-constrained-decoding.md). Nothing is let through that it cannot
keep: a keyword it does not know how to enforce makes the schema an error instead of an approximation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

    from .tokenizer import Tokenizer

MAX_SCHEMA = 4 * 1024 * 1024  # bytes
# Between two parts of the JSON: one space, or a new line with its indentation. Without a bound a model that likes
# white space would write nothing else, and a greedy one for ever.
WHITE_SPACE = r"(\x20|\n\x20{0,32})"


def read_schema(text: str, name: str) -> dict[str, Any]:
    """A JSON Schema from its text; `InputError` names what is wrong with it, or what in it cannot be enforced."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: {error}", 'give a JSON Schema, such as {"type": "object"}') from None
    if not isinstance(schema, dict):
        raise InputError(f"{name} is no JSON Schema: it must be an object", 'such as {"type": "object"}')
    check_schema(schema, name)
    return schema


def check_schema(schema: Mapping[str, Any], name: str = "the schema") -> None:
    """`InputError` if the schema is wrong, contradicts itself, or has a keyword that cannot be enforced."""
    from llguidance import LLMatcher

    _fault(LLMatcher.validate_grammar(_grammar(schema, name)), name)


class SchemaMask:
    """A `LogitsMask` that keeps each row's text a beginning of JSON that fits the schema; `complete` is its `Stopper`.

    An id that ends a reply is let through only where the JSON is whole. `InputError` as `check_schema`.
    """

    def __init__(self, schema: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: the network's, which may have more ids than the tokenizer has tokens."""
        self._grammar = _grammar(schema, "the schema")
        self._vocabulary = _vocabulary(tokenizer, vocab_size)
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}
        self._row(0)

    def __call__(self, row: int, ids: Sequence[int], logits: Tensor) -> Tensor:
        """See `LogitsMask`."""
        import numpy as np
        import torch

        matcher = self._row(row).read(ids)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        _fault(matcher.get_error(), "the schema")
        allowed = torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little")).bool()
        if not allowed.any():
            raise InputError("the schema cannot be met: the model has no token that could come next", "change it")
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def complete(self, row: int, ids: Sequence[int]) -> bool:
        """Whether the JSON is whole and nothing can follow it (see `Stopper`)."""
        return bool(self._row(row).read(ids).is_stopped())

    def _row(self, row: int) -> _Row:
        if row not in self._rows:
            self._rows[row] = _Row(self._vocabulary, self._grammar)
        return self._rows[row]


class _Row:
    """The parser of one reply, and how much it has read."""

    def __init__(self, vocabulary: LLTokenizer, grammar: str) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(vocabulary, grammar, log_level=0)
        self._read = 0
        _fault(self._matcher.get_error(), "the schema")

    def read(self, ids: Sequence[int]) -> LLMatcher:
        """Take in what is new since the last call."""
        new = list(ids[self._read :])
        if new and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
            _fault(self._matcher.get_error(), "the schema")
        self._read = len(ids)
        return self._matcher


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


@lru_cache(maxsize=1)  # it takes a third of a second with 100,000 tokens
def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    tokens = _Tokens(tokenizer, vocab_size)
    return LLTokenizer(
        TokenizerWrapper(tokens),
        n_vocab=vocab_size + 1,
        eos_token=[*tokenizer.eos_token_ids] or [tokens.eos_token_id],
        slices=LLTokenizer.json_slices(),
    )


def _grammar(schema: Mapping[str, Any], name: str) -> str:
    from llguidance import LLMatcher

    # The library takes its own options from this key of a schema; a user's schema has no say in them.
    schema = {key: value for key, value in schema.items() if key != "x-guidance"}
    for part in _parts(schema):
        least, named = part.get("minProperties"), part.get("required")
        if isinstance(least, int) and least > max(1, len(named) if isinstance(named, list) else 0):
            raise InputError(f"{name}: minProperties cannot be enforced: a name could come twice", "use `required`")
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE})
    except ValueError as error:
        _fault(str(error), name)
        raise
    return grammar


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """All objects inside a JSON value."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _fault(message: str, name: str) -> None:
    if message:
        message = " ".join(message.split())
        short = message if len(message) <= 200 else message[:200] + " ..."
        raise InputError(f"{name}: {short}", "change the schema: what cannot be enforced is not ignored")
