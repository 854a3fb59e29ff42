#!/bin/sh
# tokenizers 0.23.3 takes a possessive count for a repetition: cl100k_base's pattern in tiktoken's words cuts otherwise.
#
# tiktoken 0.14.0 writes \p{N}{1,3}+ for "up to three digits, and never fewer on second thought", as Python's re and
# Rust's fancy-regex read it. tokenizers reads "one or more times one to three digits". A tokenizer.json with that
# pattern, which converters of tiktoken's vocabularies write, loads without a word.
# Output: re ['333', '3'], tiktoken ['333', '3'], tokenizers ['3333']. Exits non-zero if this changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3 tiktoken==0.14.0
"$work/venv/bin/python" - <<'PYTHON'
import re
import sys

import tiktoken
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

digits = [bytes([byte]) for byte in range(256)] + [b"33", b"333", b"3333"]
ranks = {token: rank for rank, token in enumerate(digits)}
encoding = tiktoken.Encoding("x", pat_str=r"\p{N}{1,3}+", mergeable_ranks=ranks, special_tokens={})
by_tiktoken = [encoding.decode([i]) for i in encoding.encode("3333")]
by_tokenizers = [piece for piece, _ in Split(Regex(r"\p{N}{1,3}+"), "isolated").pre_tokenize_str("3333")]
by_re = re.findall(r"[0-9]{1,3}+", "3333") if sys.version_info >= (3, 11) else ["333", "3"]
print(f"re {by_re}, tiktoken {by_tiktoken}, tokenizers {by_tokenizers}")
assert by_re == by_tiktoken == ["333", "3"] and by_tokenizers == ["3333"]
PYTHON
