"""Small GGUF files of DBRX, written with the gguf package as llama.cpp's own converter writes them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, dequantize, quantize
from numpy.typing import NDArray

from model.quantization import BLOCKS
from tests.make_native_vectors import HALVES, blocks
from tests.weights import make_weights

# Every dimension differs and is a multiple of a block of 32.
CONFIG: dict[str, Any] = {
    "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 320, "max_seq_len": 128,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 5, "moe_top_k": 2},
}  # fmt: skip
NAMES = {
    "norm_attn_norm.norm_1.weight": "attn_norm.weight",
    "norm_attn_norm.norm_2.weight": "attn_output_norm.weight",
    "norm_attn_norm.attn.Wqkv.weight": "attn_qkv.weight",
    "norm_attn_norm.attn.out_proj.weight": "attn_output.weight",
    "ffn.router.layer.weight": "ffn_gate_inp.weight",
    "ffn.experts.mlp.w1": "ffn_gate_exps.weight",
    "ffn.experts.mlp.v1": "ffn_up_exps.weight",
    "ffn.experts.mlp.w2": "ffn_down_exps.weight",
    "transformer.wte.weight": "token_embd.weight",
    "transformer.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
SPECIAL = {"<|endoftext|>": 300, "<|pad|>": 301, "<|im_start|>": 302, "<|im_end|>": 303}
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def tensors(config: dict[str, Any], seed: int = 3) -> dict[str, NDArray[np.float32]]:
    """The weights of `make_weights` under llama.cpp's names and in its orientation; to be read only."""
    return _tensors(json.dumps(config), seed)


@lru_cache(maxsize=8)
def _tensors(settings: str, seed: int) -> dict[str, NDArray[np.float32]]:
    config = json.loads(settings)
    ffn = config["ffn_config"]
    found = {}
    for name, value in make_weights(config, seed).items():
        if name.startswith("transformer.blocks."):
            _, _, layer, name = name.split(".", 3)
            prefix = f"blk.{layer}."
        else:
            prefix = ""
        if ".experts." in name:
            value = value.reshape(ffn["moe_num_experts"], ffn["ffn_hidden_size"], config["d_model"])
        found[prefix + NAMES[name]] = np.ascontiguousarray(value.swapaxes(1, 2) if name.endswith("w2") else value)
    return found


def write_gguf(
    path: Path,
    kind: str = "f32",
    config: dict[str, Any] = CONFIG,
    seed: int = 3,
    split: int = 0,
    values: dict[str, Any] | None = None,
    arch: str = "dbrx",
    others: dict[str, str] | None = None,
) -> Path:
    """Write a file (with `split` tensors a part, several) and return the path of the first.

    `values` take the place of those that belong there, by key without the architecture; None leaves one out. `others`:
    another kind for tensors by the end of their names.
    """
    attn, ffn = config["attn_config"], config["ffn_config"]
    writer = GGUFWriter(path, arch, split_max_tensors=split)
    numbers: dict[str, Any] = {
        "context_length": config["max_seq_len"], "embedding_length": config["d_model"],
        "feed_forward_length": ffn["ffn_hidden_size"], "block_count": config["n_layers"],
        "attention.head_count": config["n_heads"], "attention.head_count_kv": attn["kv_n_heads"],
        "attention.clamp_kqv": float(attn["clip_qkv"] or 0), "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": float(attn["rope_theta"]),
        "expert_count": ffn["moe_num_experts"], "expert_used_count": ffn["moe_top_k"],
    }  # fmt: skip
    for key, value in (numbers | (values or {})).items():
        if value is not None:
            kinds = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
            writer.add_key_value(f"{arch}.{key}", value, kinds[type(value)])
    add_tokenizer(writer, config["vocab_size"])
    for name, value in tensors(config, seed).items():
        mine = next((other for end, other in (others or {}).items() if name.endswith(end)), kind)
        to = GGMLQuantizationType.F32 if "norm" in name or "gate_inp" in name else GGMLQuantizationType[mine.upper()]
        writer.add_tensor(name, packed(value, to, len(name)), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if split == 0 else min(path.parent.glob(f"{path.stem}-*"))


def packed(value: NDArray[np.float32], to: GGMLQuantizationType, seed: int) -> NDArray[Any]:
    """Floats in a type; what the package cannot make is random bytes of about the same size."""
    try:
        return quantize(value, to)
    except NotImplementedError:
        made = blocks(seed, to.name, value.size // value.shape[-1], value.shape[-1])
        shift = round(np.log2(value.std() / dequantize(made, to).std()))
        for half in HALVES[to.name]:  # the exponent of a float of 16 bits begins at the third bit of its upper byte
            made.reshape(-1)[half + 1 :: BLOCKS[to.name].nbytes] += np.uint8(4 * shift % 256)
        return made.reshape(*value.shape[:-1], -1)


def add_tokenizer(writer: GGUFWriter, vocab: int) -> None:
    """All bytes, a few merges, DBRX's special tokens under small ids, and a padded rest."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    names = [letters[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in MERGES]
    names += [f"[PAD{i}]" for i in range(len(names), vocab)]
    types = [1] * (256 + len(MERGES)) + [5] * (vocab - 256 - len(MERGES))
    for name, i in SPECIAL.items():
        names[i], types[i] = name, 3
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("dbrx")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(SPECIAL["<|endoftext|>"])
    writer.add_bos_token_id(SPECIAL["<|endoftext|>"])
    writer.add_chat_template(TEMPLATE)
