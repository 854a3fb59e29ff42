#!/bin/sh
# tokenizers 0.23.3 ignores the "id" of an entry of added_tokens in a tokenizer.json.
#
# Seen: a special token that is no entry of the model's vocabulary gets the number of entries as its id, whatever id is
# written beside it, without an error or a warning; the id of a token with an entry comes from there. So ids with gaps
# (cl100k_base has 16 unused ones before its last special tokens) survive only if model.vocab has the tokens, too.
# Output: stated 7, found 2; with an entry: stated 7, found 7. Exits non-zero if this changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3
"$work/venv/bin/python" - <<'PYTHON'
import json
from tokenizers import Tokenizer

def found(vocab):
    token = {"id": 7, "content": "<end>", "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    values = {"version": "1.0", "added_tokens": [token], "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    values |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return Tokenizer.from_str(json.dumps(values)).token_to_id("<end>")

alone, with_entry = found({"a": 0, "b": 1}), found({"a": 0, "b": 1, "<end>": 7})
print(f"stated 7, found {alone}; with an entry: stated 7, found {with_entry}")
assert (alone, with_entry) == (2, 7)
PYTHON
