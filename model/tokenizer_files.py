"""A tokenizer's files as they are written: other programs read the same ids in them.

Hugging Face's tokenizers numbers a special token by its entry in the model's vocabulary; one that has none there is
counted on behind the vocabulary, whatever id it is given. Of the classes of transformers only the plain one leaves the
pre_tokenizer of tokenizer.json as it is: 5.24.0 builds GPT-2's for `GPT2Tokenizer`, and for DBRX where none is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .bpe import CHARACTER_OF_BYTE, POSSESSIVE_COUNT, Vocabulary, merges_of

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
PLAIN_CLASS = "PreTrainedTokenizerFast"  # known to transformers 4 and 5
# What changes no ids, and is read alike by both.
KEPT = ("chat_template", "clean_up_tokenization_spaces", "model_max_length", "padding_side", "truncation_side")


def reads_alike(values: Mapping[str, Any], vocabulary: Vocabulary) -> bool:
    """Whether a parsed tokenizer.json gives other programs the ids of `vocabulary`, which was read from it."""
    model, listed = values["model"]["vocab"], {token["content"] for token in values["added_tokens"]}
    numbered = all(name in listed and model.get(name) == token.id for name, token in vocabulary.added.items())
    whole = values.get("truncation") is None and values.get("padding") is None
    return numbered and whole and not POSSESSIVE_COUNT.search(str(values["pre_tokenizer"]))


def fillers(vocab: Mapping[str, int], size: int) -> dict[str, int]:
    """Names for the ids below `size` that have none, as llama.cpp's converter calls them; none is in `vocab`."""
    gaps = sorted({*range(size)} - {*vocab.values()})
    head = "[PAD"
    while any(f"{head}{i}]" in vocab for i in gaps):
        head = "[" + head
    return {f"{head}{i}]": i for i in gaps}


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of a tokenizer.json; every id up to the largest has a token, so that counting them finds no gap."""
    special = {token.id for token in vocabulary.added.values()}
    vocab = {spelled(token): i for token, i in vocabulary.ids.items() if i not in special}
    vocab |= {name: token.id for name, token in vocabulary.added.items()}
    vocab |= fillers(vocab, max(vocab.values()))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Removed", "invert": True}
    written = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token.id, "content": name, **flags, "special": token.special}
            for name, token in sorted(vocabulary.added.items(), key=lambda item: item[1].id)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]},
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [f"{spelled(left)} {spelled(right)}" for left, right in merges_of(vocabulary)],
        },
    }
    assert reads_alike(written, vocabulary)
    return written


def tokenizer_config(read: Mapping[str, Any], named_tokens: Mapping[str, str]) -> dict[str, Any]:
    """The content of a tokenizer_config.json, from what was read of one."""
    kept = {key: read[key] for key in KEPT if key in read}
    return {"tokenizer_class": PLAIN_CLASS, "clean_up_tokenization_spaces": False, **kept, **named_tokens}


def spelled(token: bytes) -> str:
    """A token in the letters of a tokenizer.json, one for each byte."""
    return "".join(CHARACTER_OF_BYTE[byte] for byte in token)
