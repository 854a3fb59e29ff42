"""Promises 8 and 28: JSON of others costs little, and a value of a wrong sort ends in one line that names the file."""

from __future__ import annotations

import copy
import json
import math
import random
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.adapter_config import LoraConfig
from model.bpe import CHARACTER_OF_BYTE
from model.checkpoint import Checkpoint
from model.config import DbrxConfig
from model.errors import DbrxError, ModelError
from model.generation_config import GenerationConfig
from model.json_text import CONFIG, DEEPEST, TOKENIZER, Limits, parse
from model.messages import Message
from model.safetensors_file import read_json
from model.tokenizer import Tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>")
FILES: dict[str, dict[str, Any]] = {
    "config.json": {
        "model_type": "dbrx", "architectures": ["DbrxForCausalLM"], "d_model": 32, "n_heads": 4, "n_layers": 1,
        "max_seq_len": 512, "vocab_size": 264, "eos_token_id": 257, "tie_word_embeddings": False,
        "transformers_version": "4.57.6", "rope_scaling": None, "quantization_config": {"quant_method": "fp8"},
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500000, "attn_pdrop": 0.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    },
    "tokenizer.json": {
        "version": "1.0", "normalizer": None, "decoder": BYTE_LEVEL,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\p{L}+|\P{L}"}, "behavior": "Isolated", "invert": False},
            {**BYTE_LEVEL, "use_regex": False}]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]},
        "added_tokens": [
            {"id": 257 + i, "content": name, "special": True, "normalized": False, "lstrip": False}
            for i, name in enumerate(SPECIAL)
        ],
        "model": {"type": "BPE", "vocab": {c: b for b, c in CHARACTER_OF_BYTE.items()} | {"ab": 256},
                  "merges": [["a", "b"]], "ignore_merges": False},
    },
    "tokenizer_config.json": {
        "eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>"}, "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|im_start|>"], "model_max_length": 512,
        "added_tokens_decoder": {"261": {"content": "<|x|>", "special": True}},
        "chat_template": [{"name": "default", "template": "{% for m in messages %}{{ m.content }}{% endfor %}"}],
    },
    "special_tokens_map.json": {"bos_token": {"content": "<|endoftext|>", "lstrip": False}, "unk_token": "<|pad|>"},
    "generation_config.json": {
        "eos_token_id": [258, 259], "pad_token_id": 260, "do_sample": True, "temperature": 0.7, "top_p": 0.9,
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 9, "num_beams": 1,
    },
    "adapter_config.json": {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["Wqkv"], "rank_pattern": {"Wqkv": 4},
        "alpha_pattern": {"Wqkv": 8}, "layers_to_transform": [0], "layers_pattern": "blocks", "bias": "none",
        "use_rslora": False, "modules_to_save": None, "init_lora_weights": True, "lora_dropout": 0.1,
    },
    "model.safetensors.index.json": {
        "metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"},
    },
}  # fmt: skip
WRONG: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, -0.0, math.nan, math.inf, -math.inf, 2**31, 2**63, 10**400, 1e308, 1e-320,
    "", "x", "7", "\x1b]0;x\x07", "a" * 10**5, [], {}, [[]], [None], ["x", 1], {"x": None}, {"content": 5},
    {"name": []}, [{}], [True], "\ud800", {"type": []}, {"type": "Sequence"}, {"__float__": "NaN"},
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container inside a value with each of its keys; of a vocabulary the first few."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys[:12]:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def read(folder: Path, file: str) -> None:
    """What the program reads of a file before any weights."""
    if file == "adapter_config.json":
        lora = LoraConfig(folder / file)
        lora.selects("transformer.blocks.0.norm_attn_norm.attn.Wqkv")
        lora.scale("transformer.blocks.0.norm_attn_norm.attn.Wqkv", 4)
    elif file == "model.safetensors.index.json":
        Checkpoint.open(folder).close()
    else:
        config = DbrxConfig.from_json(folder / "config.json")
        vars(GenerationConfig.from_folder(folder).sampling())
        if "token" in file:
            tokenizer = Tokenizer.from_folder(folder)
            tokenizer.require_rows(config.vocab_size, folder)
            tokenizer.encode_segments(tokenizer.chat_template.segments([Message("user", "hi ab <|pad|> 1")]))
            tokenizer.decode(range(300))


def millions(limits: Limits) -> Iterator[bytes]:
    """Texts within the limit of bytes, and of far more entries than a file of that kind has."""
    room = limits.nbytes
    yield b'{"a":[' + b"[]," * (room // 3 - 4) + b"[]]}"
    yield b"{" + b",".join(b'"%06d":0' % i for i in range(room // 12)) + b"}"
    yield b"[" * (room // 2) + b"]" * (room // 2)
    yield b'{"a":' * (room // 8)
    yield b"0," * (room // 2)


@pytest.mark.parametrize("limits", [CONFIG, pytest.param(TOKENIZER, marks=pytest.mark.soak)])
def test_millions_of_entries_cost_nothing(limits: Limits) -> None:
    for content in millions(limits):
        tracemalloc.start()
        started = time.process_time()
        with pytest.raises(ValueError, match="entries"):
            parse(content, limits)
        assert time.process_time() - started < 1
        assert tracemalloc.get_traced_memory()[1] < 2**16
        tracemalloc.stop()
    with pytest.raises(ValueError, match="bytes"):
        parse(b" " * (limits.nbytes + 1), limits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested too deeply"),
        ('{"a":' * 5000 + "0" + "}" * 5000, "nested too deeply"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' occurs twice"),
        ('{"a": ' + "9" * 5000 + "}", "thousands of digits"),
        ('{"a": 1,}', "is not valid JSON: .*line 1"),
        ("", "is not valid JSON"),
    ],
)
def test_what_is_no_json_is_told_in_our_words(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text.encode())
    assert parse(("[" * DEEPEST + "]" * DEEPEST).encode()) is not None


def test_half_of_a_surrogate_pair_is_no_text_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    for text in ('{"a": "\\ud800"}', '{"\\uDC00": 1}', '{"a": ["x\\ud83d"]}'):
        path.write_text(text)
        with pytest.raises(ModelError, match=r"config\.json: holds half of a surrogate pair"):
            read_json(path)
    path.write_text('{"a": "\\ud83d\\ude00 \\\\ud800"}')
    assert read_json(path) == {"a": "\U0001f600 \\ud800"}
    assert parse(b'"\\ud83d"') == "\ud83d"  # a piece of a stream, whose next one begins with the other half


@pytest.mark.parametrize("count", [30, pytest.param(700, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("file", FILES)
def test_a_value_of_a_wrong_sort_is_told_by_file_and_key(tmp_path: Path, file: str, count: int) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    chance = random.Random(count)
    for _ in range(count):
        content = copy.deepcopy(FILES[file])
        where, key = chance.choice(list(places(content)))
        wrong = chance.choice(WRONG)
        where[key] = wrong
        (tmp_path / file).write_text(json.dumps(content), "utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(tmp_path, file)
            except DbrxError as fault:
                assert fault.exit_code in (2, 3) and fault.one_line.isprintable(), fault.one_line
                assert str(tmp_path) in fault.message, (key, wrong, fault.message)
                assert len(fault.one_line) < 1000
            except Exception as error:
                raise AssertionError((file, key, repr(wrong)[:50])) from error
