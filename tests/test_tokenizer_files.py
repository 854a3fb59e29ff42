"""The tokenizer's files as other programs leave and read them: `tokenizers`; transformers 4 and 5 as references."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from model.bpe import CL100K_PATTERN, cl100k_vocabulary, vocabulary_from_json
from model.errors import ModelError
from model.tokenizer import AutoTokenizer, Tokenizer
from model.tokenizer_files import tokenizer_json
from tests.cli import Cli
from tests.gguf_files import CONFIG, SPECIAL, write_gguf
from tests.test_tokenizer import demo_json, split_json, varied_texts, written
from tests.test_tokenizer import tokenizer_json as json_of

TEXTS = ["12345678", "3333", "3333 He's  DON'T\n\n x", "\t\n 007\r\n", *varied_texts(60, seed=3)]
# What tiktoken 0.14.0 and transformers' converter of its vocabularies write.
TIKTOKEN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TIKTOKEN_05 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
A, B = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
ALONE = {"type": "TemplateProcessing", "single": [A], "pair": [A, B], "special_tokens": {}}


def small_json(**changes: Any) -> dict[str, Any]:
    """All bytes, two merges, special tokens with gaps before them; cut as cl100k is."""
    vocab = {written(bytes([byte])): byte for byte in range(256)} | {"ab": 256, "33": 257}
    return json_of(vocab, ["a b", "3 3"], split_json(CL100K_PATTERN), SPECIAL) | changes


def folder_of(path: Path, values: dict[str, Any] | None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    if values is not None:
        (path / "tokenizer.json").write_text(json.dumps(values))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def check_read_alike(folder: Path, ours: Tokenizer) -> None:
    """`tokenizers` finds the ids of `ours` in the folder's tokenizer.json, and so does this program."""
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert {name: theirs.token_to_id(name) for name in ours.special_tokens} == ours.special_tokens
    again = ours if len(ours) > 100_000 else AutoTokenizer.from_pretrained(folder)  # which takes seconds
    assert again.special_tokens == ours.special_tokens and again.eos_token_ids == ours.eos_token_ids
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids == again.encode(text), text
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    assert theirs.get_vocab_size() == 1 + max(theirs.get_vocab().values())
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.slow
def test_a_checkpoint_without_tokenizer_json(tmp_path: Path) -> None:
    config = {"tokenizer_class": "TiktokenTokenizerWrapper", "auto_map": {"AutoTokenizer": ["t.T", None]}}
    ours = AutoTokenizer.from_pretrained(folder_of(tmp_path / "m", None, **config, eos_token="<|endoftext|>"))
    ours.save_pretrained(tmp_path / "out")
    check_read_alike(tmp_path / "out", ours)
    written_config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "auto_map" not in written_config and written_config["chat_template"] == ours.chat_template.text


def test_a_gguf_with_gaps_between_its_ids(tmp_path: Path, cli: Cli) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    assert cli("convert", path, tmp_path / "out").code == 0
    check_read_alike(tmp_path / "out", AutoTokenizer.from_pretrained(path))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.encode("<|im_end|>").ids == [SPECIAL["<|im_end|>"]]


@pytest.mark.parametrize("values", [demo_json, small_json], ids=["digits", "gaps"])
def test_what_is_written_anew_gives_the_same_ids(tmp_path: Path, values: Any) -> None:
    ours = Tokenizer(vocabulary_from_json(values()), eos_token_ids=[])
    folder_of(tmp_path, tokenizer_json(ours.vocabulary), tokenizer_class="PreTrainedTokenizerFast")
    check_read_alike(tmp_path, ours)


def test_a_gap_is_filled_under_a_name_that_is_free(tmp_path: Path) -> None:
    values = small_json()
    gap = next(i for i in range(258, 300) if i not in SPECIAL.values())
    values["added_tokens"][0]["content"] = f"[PAD{gap}]"
    ours = Tokenizer(vocabulary_from_json(values))
    folder_of(tmp_path, tokenizer_json(ours.vocabulary), tokenizer_class="PreTrainedTokenizerFast")
    check_read_alike(tmp_path, ours)


@pytest.mark.parametrize(
    "kept",
    [
        {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 8},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "a",
            }
        },
    ],
)
def test_stored_truncation_and_padding_are_left_out(tmp_path: Path, kept: dict[str, Any]) -> None:
    whole = tokenizer_json(vocabulary_from_json(small_json()))
    ours = AutoTokenizer.from_pretrained(folder_of(tmp_path / "m", whole | kept))
    ours.save_pretrained(tmp_path / "out")
    check_read_alike(tmp_path / "out", ours)


def test_a_file_that_others_read_alike_is_copied(tmp_path: Path) -> None:
    whole = tokenizer_json(vocabulary_from_json(small_json()))
    source = folder_of(tmp_path / "m", whole, tokenizer_class="GPT2Tokenizer", model_max_length=99)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["model_max_length"] == 99
    AutoTokenizer.from_pretrained(source).save_pretrained(source)  # onto itself
    check_read_alike(source, AutoTokenizer.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("pattern", [TIKTOKEN, TIKTOKEN_05])
def test_cl100k_in_the_words_of_tiktoken(tmp_path: Path, pattern: str) -> None:
    source = folder_of(tmp_path / "m", small_json(pre_tokenizer=split_json(pattern)))
    ours = AutoTokenizer.from_pretrained(source)
    assert ours.vocabulary.pattern == CL100K_PATTERN
    ours.save_pretrained(tmp_path / "out")
    check_read_alike(tmp_path / "out", ours)


def test_patterns_that_programs_read_in_two_ways_are_refused() -> None:
    with pytest.raises(ModelError, match=r"has \{1,3\}\+, which programs read in two ways") as error:
        vocabulary_from_json(small_json(pre_tokenizer=split_json(r"\p{N}{1,3}+|[\s\S]")))
    assert error.value.hint == "write {1,3} in its place"
    values = small_json(pre_tokenizer=split_json(TIKTOKEN))
    values["model"]["vocab"]["ĊĠ"] = 258  # "\n ": where the text ends, tiktoken's words make it and the older do not
    with pytest.raises(ModelError, match="the vocabulary is not"):
        vocabulary_from_json(values)


LLAMA_4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+|\p{L}+"
)
QWEN_2 = CL100K_PATTERN.replace("{1,3}", "")


@pytest.mark.parametrize(
    "pattern",
    [
        LLAMA_4,
        QWEN_2,
        r"[$^]+|\$|[^$^]+",
        r"\s+(?=\n|\z)|\s|\S+",
        r"(?<![^\n])\s+|\w+|\W",
        r"\p{Alphabetic}+|[\s\S]",
        r"\p{^L}+|\p{L}",
    ],
)
def test_patterns_that_programs_read_alike(pattern: str) -> None:
    """Those that the hints of the refusals name are among them."""
    values = small_json(pre_tokenizer=split_json(pattern))
    for pair in ("ĠĠ", "ĠĊ", "ĊĠ", "Ċx"):
        values["model"]["vocab"][pair] = len(values["model"]["vocab"])
        values["model"]["merges"].append(f"{pair[0]} {pair[1]}")
    ours, theirs = Tokenizer(vocabulary_from_json(values)), tokenizers.Tokenizer.from_str(json.dumps(values))
    for text in ["  \n  x\n\n  \n", "a  \n", "$^ab$\n^", *TEXTS]:
        assert ours.encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize(
    "processor",
    [
        None, ALONE, BYTE_LEVEL, {**ALONE, "pair": [A, A]}, {"type": "Sequence", "processors": []},
        {"type": "Sequence", "processors": [BYTE_LEVEL, ALONE]},
    ],
)  # fmt: skip
def test_post_processors_that_add_nothing(processor: Any) -> None:
    values = small_json(post_processor=processor)
    ours, theirs = Tokenizer(vocabulary_from_json(values)), tokenizers.Tokenizer.from_str(json.dumps(values))
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text).ids for text in TEXTS]


END = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
TOKENS = {"<|im_end|>": {"id": "<|im_end|>", "ids": [303], "tokens": ["<|im_end|>"]}}


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({**ALONE, "single": [END, A], "special_tokens": TOKENS}, "adds '<|im_end|>' to each text"),
        ({**ALONE, "single": [A, END], "special_tokens": TOKENS}, "adds '<|im_end|>'"),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, {**ALONE, "single": [END, A]}]}, "adds '<|im_end|>'"),
        ({**ALONE, "single": [A, A]}, "more of a text than the text"),
        ({**ALONE, "single": []}, "more of a text than the text"),
        ({"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}, "RobertaProcessing"),
        ({"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}, "BertProcessing"),
    ],
)
def test_post_processors_that_add_tokens_are_refused(processor: Any, message: str) -> None:
    with pytest.raises(ModelError) as error:
        vocabulary_from_json(small_json(post_processor=processor))
    assert message in error.value.message and error.value.hint


def test_an_added_token_with_two_ids_is_refused() -> None:
    values = small_json()
    values["model"]["vocab"]["<|im_end|>"] = 299  # `tokenizers` would take this one
    assert tokenizers.Tokenizer.from_str(json.dumps(values)).token_to_id("<|im_end|>") == 299
    with pytest.raises(ModelError, match=r"'<\|im_end\|>' has the id 303, 299 in the model"):
        vocabulary_from_json(values)


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "<|im_end|>"},
        {"pad_token": {"content": "<|im_end|>", "special": True}},
        {"additional_special_tokens": ["<|im_start|>", {"content": "<|im_end|>"}]},
        {"extra_special_tokens": ["<|im_end|>"]},
        {"extra_special_tokens": {"turn_token": "<|im_end|>"}},
        {"model_specific_special_tokens": {"turn_token": "<|im_end|>"}},
    ],
)
def test_ordinary_tokens_that_the_configuration_calls_special(tmp_path: Path, config: dict[str, Any]) -> None:
    values = small_json()
    values["added_tokens"] = []
    values["model"]["vocab"] |= SPECIAL
    source = folder_of(tmp_path / "m", values, **config, unk_token="!")
    ours = AutoTokenizer.from_pretrained(source)
    assert ours.special_tokens["<|im_end|>"] == 303 and "!" not in ours.special_tokens
    ours.save_pretrained(tmp_path / "out")
    check_read_alike(tmp_path / "out", ours)


READ_AND_SAVE = """
import json, sys, warnings
from transformers import AutoTokenizer
folder, out, texts = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.save_pretrained(out)
ids = [tokenizer(text, add_special_tokens=True).input_ids for text in texts]
names = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
print(json.dumps([ids, tokenizer.convert_tokens_to_ids(names), len(tokenizer)]))
"""


@pytest.mark.reference
@pytest.mark.parametrize("source", ["without", "gguf", "gpt2", "demo", "tiktoken", "backend"])
def test_transformers_reads_and_saves_the_same_ids(
    tmp_path: Path, source: str, request: pytest.FixtureRequest, cli: Cli
) -> None:
    """Needs REFERENCE_PYTHONS: interpreters of environments with transformers, separated by colons."""
    pythons = os.environ.get("REFERENCE_PYTHONS")
    if not pythons:
        pytest.skip("REFERENCE_PYTHONS names no interpreters with transformers")
    if source == "demo":
        origin = request.getfixturevalue("demo_checkpoint")
    elif source == "gguf":
        origin = write_gguf(tmp_path / "m.gguf")
    else:
        values = tokenizer_json(cl100k_vocabulary()) if source != "without" else None
        if source == "tiktoken":
            assert values is not None
            values["pre_tokenizer"] = split_json(TIKTOKEN)
        classes = {"gpt2": "GPT2Tokenizer", "without": "TiktokenTokenizerWrapper"}
        config = {"tokenizer_class": classes.get(source, "TokenizersBackend"), "eos_token": "<|endoftext|>"}
        origin = folder_of(tmp_path / "m", values, **config, extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    ours = AutoTokenizer.from_pretrained(origin)
    ours.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"model_type": "dbrx"}')
    (tmp_path / "texts").write_text(json.dumps(TEXTS))
    names = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    for number, python in enumerate(pythons.split(":")):
        saved = tmp_path / f"saved-{number}"
        command = [python, "-c", READ_AND_SAVE, str(tmp_path / "out"), str(saved), str(tmp_path / "texts")]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
        ids, special, size = json.loads(ran.stdout.splitlines()[-1])
        assert ids == [ours.encode(text) for text in TEXTS], python
        known = {name: i for name, i in zip(names, special, strict=True) if name in ours.special_tokens}
        assert known == {name: ours.special_tokens[name] for name in known} and size == len(ours)
        again = AutoTokenizer.from_pretrained(saved)  # what that release saves loads here
        assert [again.encode(text) for text in TEXTS] == ids and again.eos_token == ours.eos_token
        assert {name: again.special_tokens[name] for name in known} == known


WHOLE_FOLDER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1], sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
with torch.no_grad():
    print(json.dumps([ids[0].tolist(), model(ids).logits[0, -1].tolist()]))
"""


@pytest.mark.reference
@pytest.mark.parametrize("clip", [8.0, None])
def test_transformers_computes_a_converted_folder_right(tmp_path: Path, clip: float | None, cli: Cli) -> None:
    """Needs REFERENCE_PYTHONS; tokenizer, configuration and weights together, from a GGUF file."""
    pythons = os.environ.get("REFERENCE_PYTHONS")
    if not pythons:
        pytest.skip("REFERENCE_PYTHONS names no interpreters with transformers")
    import torch

    from model import DbrxForCausalLM

    config = {**CONFIG, "attn_config": {**CONFIG["attn_config"], "clip_qkv": clip}}
    path = write_gguf(tmp_path / "m.gguf", config=config)
    assert cli("convert", path, tmp_path / "out").code == 0
    text = "hello world 12345678 3333"
    ids = AutoTokenizer.from_pretrained(path).encode(text)
    with torch.no_grad():
        ours = DbrxForCausalLM.from_pretrained(path)(torch.tensor([ids])).logits[0, -1]
    for python in pythons.split(":"):
        command = [python, "-c", WHOLE_FOLDER, str(tmp_path / "out"), text]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
        their_ids, logits = json.loads(ran.stdout.splitlines()[-1])
        assert their_ids == ids and torch.allclose(torch.tensor(logits), ours, atol=1e-3), python
