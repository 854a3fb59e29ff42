#!/bin/sh
# transformers 5.24.0 drops the pre_tokenizer of tokenizer.json for GPT2Tokenizer, and for DBRX where no class is named.
#
# Databricks' own repositories and many byte-level vocabularies name GPT2Tokenizer. 4.57.6 cuts text as tokenizer.json
# says; 5.24.0 builds GPT-2's pre_tokenizer in its place (3333 is cut as 33 33 and not as 333 3), without a warning, and
# save_pretrained writes that one. With PreTrainedTokenizerFast both follow the file.
# Output: a line for each class with the pieces of 3333. Exits non-zero if this changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0
"$work/venv/bin/python" - "$work" <<'PYTHON'
import json
import pathlib
import sys

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocab = {letter: i for i, letter in enumerate([*letters, "33", "333", "3333", "<|endoftext|>"])}
tokenizer = Tokenizer(models.BPE(vocab, [("3", "3"), ("33", "3"), ("333", "3")]))
split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated")
bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
tokenizer.decoder = decoders.ByteLevel()
seen = {}
for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", None):
    folder = pathlib.Path(sys.argv[1], str(name))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "dbrx"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} if name else {}))
    loaded = AutoTokenizer.from_pretrained(folder)
    seen[name] = loaded.convert_ids_to_tokens(loaded("3333")["input_ids"])
    print(f"{name}: {seen[name]}")
assert seen == {"PreTrainedTokenizerFast": ["333", "3"], "GPT2Tokenizer": ["33", "33"], None: ["33", "33"]}
PYTHON
