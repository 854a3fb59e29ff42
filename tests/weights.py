"""Small DBRX weights that need no file: the same numbers from the same config and seed, everywhere and forever.

The golden data was made from them by the reference (tests/reference/), and the tests make them again. They come from
numpy's legacy generator, whose stream is frozen, and every value is exact in bfloat16: a checkpoint in float32 and
one in bfloat16 hold the same model, and the last bit of a platform's `log` is rounded away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Floats = NDArray[np.floating[Any]]

# Standard deviations seen by the network; chosen so that every part of it changes the logits.
QUERY_KEY_STD = 1.3  # attention scores of about 1.7: neither uniform nor one-hot
LOGIT_STD = 4.0  # logits reach 10 to 15
ROUTER_STD = 1.5
ROUTER_BIAS = 3.0  # pull of the common direction on the most and the least favoured expert
COMMON_SHARE = 0.5  # of the embeddings


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a DBRX checkpoint's parameters, in the checkpoint's order."""
    width, vocab = config["d_model"], config["vocab_size"]
    attn, ffn = config.get("attn_config") or {}, config.get("ffn_config") or {}
    head_dim = width // config["n_heads"]
    experts = ffn.get("moe_num_experts", 4)
    stacked = (experts * ffn.get("ffn_hidden_size", 3584), width)
    block = {
        "norm_attn_norm.norm_1.weight": (width,),
        "norm_attn_norm.attn.Wqkv.weight": (width + 2 * attn.get("kv_n_heads", 1) * head_dim, width),
        "norm_attn_norm.attn.out_proj.weight": (width, width),
        "norm_attn_norm.norm_2.weight": (width,),
        "ffn.router.layer.weight": (experts, width),
        "ffn.experts.mlp.w1": stacked,
        "ffn.experts.mlp.v1": stacked,
        "ffn.experts.mlp.w2": stacked,
    }
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, width)}
    for layer in range(config["n_layers"]):
        shapes |= {f"transformer.blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"transformer.norm_f.weight": (width,), "lm_head.weight": (vocab, width)}


def make_weights(config: dict[str, Any], seed: int) -> dict[str, Array]:
    """Weights of a whole network by the checkpoint's names; float32, exact in bfloat16.

    Embeddings share a direction and routers favour some experts along it, so that experts get very unequal numbers of
    tokens. Where `clip_qkv` is set, one output a head of the fused projection is large enough to be clipped often.
    """
    width = config["d_model"]
    common = _normal(seed, "common direction", (width,))
    common = common - common.mean()  # the layer norms take the mean away
    common /= np.sqrt(np.mean(common**2))
    return {
        name: _round_to_bfloat16(_values(config, seed, name, shape, common))
        for name, shape in parameter_shapes(config).items()
    }


def adapter_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    """Tensors of an adapter by their names, exact in bfloat16."""
    return {
        name: _round_to_bfloat16(_normal(0, name, tuple(shape)) / sqrt(shape[-1])) for name, shape in shapes.items()
    }


def fingerprint(weights: dict[str, Array]) -> str:
    """Sha256 of all names and values: the golden data names it, so that a changed generator is not taken for a bug."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode() + value.tobytes())
    return digest.hexdigest()


def make_checkpoint(
    folder: str | Path,
    config: dict[str, Any],
    seed: int,
    dtype: str = "float32",
    shards: int = 3,
    eos_token_id: Sequence[int] = (),
) -> Path:
    """Write a checkpoint as the Hub holds it: config.json, generation_config.json, safetensors with an index.

    dtype: float32, bfloat16 or float16. One shard is written as model.safetensors without an index.
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    full_config = {"architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "torch_dtype": dtype, **config}
    _write_json(folder / "config.json", full_config)
    _write_json(folder / "generation_config.json", {"eos_token_id": list(eos_token_id) or None})
    tensors = {
        name: torch.from_numpy(value).to(getattr(torch, dtype)) for name, value in make_weights(config, seed).items()
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    total = sum(t.nbytes for t in tensors.values())
    weight_map: dict[str, str] = {}
    start = 0
    for name, tensor in tensors.items():  # shards of about equal size, cut where the bytes say, even inside a layer
        shard = min(start * shards // total, shards - 1)
        weight_map[name] = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        start += tensor.nbytes
    for file in sorted(set(weight_map.values())):
        content = {name: tensors[name] for name, where in weight_map.items() if where == file}
        save_file(content, folder / file, metadata={"format": "pt"})
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def write_small_tokenizer(folder: Path) -> None:
    """A tokenizer.json of 94 tokens, the printable ASCII characters, for vocabularies that are smaller than DBRX's."""
    values = {
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {chr(ord("!") + i): i for i in range(94)}, "merges": []},
    }
    _write_json(folder / "tokenizer.json", values)


def _values(config: dict[str, Any], seed: int, name: str, shape: tuple[int, ...], common: Array) -> Floats:
    width: int = config["d_model"]
    noise = _normal(seed, name, shape)
    per_input = noise / sqrt(width)  # maps a normalised input to outputs of standard deviation 1
    match name.removesuffix(".weight").rsplit(".", 1)[-1]:
        case "wte":
            return noise + COMMON_SHARE * common
        case "norm_1" | "norm_2" | "norm_f":
            return 1 + 0.25 * noise
        case "Wqkv":
            return per_input * _qkv_scale(config)[:, None]
        case "layer":
            favour = np.linspace(-1, 1, shape[0], dtype=np.float32)
            favour = favour[_random_state(seed, name + " favour").permutation(shape[0])]
            return ROUTER_STD * per_input + ROUTER_BIAS * favour[:, None] * common / width
        case "w2":
            return 2 * noise / sqrt((config.get("ffn_config") or {}).get("ffn_hidden_size", 3584))
        case "lm_head":
            return LOGIT_STD * per_input
        case _:  # out_proj, w1, v1
            return per_input


def _qkv_scale(config: dict[str, Any]) -> Array:
    """Standard deviation of each output of the fused projection, [d_model + 2 * kv_heads * head_dim]."""
    width, attn = config["d_model"], config.get("attn_config") or {}
    head_dim = width // config["n_heads"]
    kv_width = attn.get("kv_n_heads", 1) * head_dim
    clip = attn.get("clip_qkv")
    parts = []
    # Another place inside the head for each of q, k and v, so that large queries do not meet large keys.
    for size, std, place in ((width, QUERY_KEY_STD, 0), (kv_width, QUERY_KEY_STD, head_dim - 1), (kv_width, 1.0, 1)):
        scale = np.full(size, std, np.float32)
        if clip is not None:
            scale[place::head_dim] = max(std, 0.75 * clip)  # 18 % of these outputs are beyond the clip
        parts.append(scale)
    return np.concatenate(parts)


def _random_state(seed: int, name: str) -> np.random.RandomState:
    """A stream of its own for each tensor, so that one tensor's size never moves another's numbers."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


@lru_cache(256)  # one test after the other writes the same network, as other files
def _normal(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    values = _random_state(seed, name).standard_normal(prod(shape)).astype(np.float32).reshape(shape)
    values.flags.writeable = False
    return values


def _round_to_bfloat16(values: Floats) -> Array:
    """The nearest float32 whose lower 16 bits are zero, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
