#!/bin/sh
# llguidance 1.9.1 keeps numbers of a schema as float64. An integer constant beyond 2^53 becomes another one: the reply
# may be 12345678901234567000 and may not be the constant itself, so that no reply ever fits. A bound of 2^53 + 1 lets
# 2^53 through. Both compile without a word; an integer of 2^64 is "not JSON serializable" to the Python binding.
# Seen: "const: itself False, another True; minimum 2^53 + 1 takes 2^53: True; 2^64: Value is not JSON serializable".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llguidance==1.9.1
"$folder/venv/bin/python" - <<'END'
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

class Bytes:  # a token a byte, 256 ends
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]
    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())

vocabulary = LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=257)

def takes(schema, text):
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_json_schema(schema))
    assert not matcher.is_error(), matcher.get_error()
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

constant = {"const": 12345678901234567890}
itself, another = takes(constant, "12345678901234567890"), takes(constant, "12345678901234567000")
below = takes({"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 3}, str(2**53))
try:
    LLMatcher.grammar_from_json_schema({"const": 2**64})
    said = "taken"
except ValueError as error:
    said = str(error)
print(f"const: itself {itself}, another {another}; minimum 2^53 + 1 takes 2^53: {below}; 2^64: {said[:30]}")
raise SystemExit((itself, another, below) != (False, True, True) or "not JSON serializable" not in said)
END
