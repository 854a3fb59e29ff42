"""A Llama GGUF file re-expressed exactly as a DBRX checkpoint: a small real model for DBRX's architecture (no torch).

Both networks are pre-norm transformers with grouped-query attention, rotary positions and a SiLU-gated feed-forward.
What differs is bridged so:

- Norm. Llama divides by the root mean square; DBRX's LayerNorm subtracts the mean first, which changes nothing where
  the mean is zero. So the residual stream x [hidden] becomes c·Q·x [d_model], d_model = 4/3·hidden, where Q has
  orthonormal columns, all orthogonal to the ones vector: c·Q·x has zero mean, and with c² = d_model / hidden the same
  mean square as x, so that eps acts alike. As QᵀQ = 1, a matrix W that reads the normalised stream becomes
  W·diag(gain)·Qᵀ/c, one that writes to the stream c·Q·W, and the weights of all norms are 1.
- Q. Every three numbers become four by a 4x4 Hadamard matrix without its column of ones, halved: entries of ±1/2 in
  blocks that small keep the rounding tiny.
- Heads. Their size stays, so there are a third more, and as many more key-value heads. The new ones are zero: they
  follow the real ones in whole groups and write nothing.
- Rotary positions. GGUF keeps a head's query and key rows in pairs (0, 1), (2, 3), ...; DBRX rotates row i with row
  i + head_dim/2.
- Feed-forward. It is cut into four experts, all four always chosen. A zero router weighs each by 1/4, so w2 carries a
  factor of 4. With a `Routing` (demo_routing.py) it becomes sixteen that overlap, of which a router chooses four.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray

from ..checkpoint import EMBEDDING
from ..config import DbrxAttentionConfig, DbrxConfig, DbrxFFNConfig
from ..errors import ModelError
from . import demo_routing
from .demo_routing import Routing

Array = NDArray[np.float32]
Bits = NDArray[np.uint16]  # of bfloat16, which numpy lacks
Named = Iterator[tuple[str, Array | Bits]]
Store = Callable[[Array], Array | Bits]

EXPERTS = 4
EPS = 1e-5  # DBRX's
SHARD_BYTES = 200_000_000
BLOCK = np.array([[0.5, 0.5, 0.5], [-0.5, 0.5, -0.5], [0.5, -0.5, -0.5], [-0.5, -0.5, 0.5]], np.float32)  # Q's diagonal
BLOCK_TENSORS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
CONTROL, USER_DEFINED = 3, 4  # token types that are matched as a whole, before the text is split


def convert(
    gguf: Path, out: Path, progress: Callable[[int, int], None] | None = None, routing: Routing | None = None
) -> None:
    """Write the Llama of a GGUF file as a complete DBRX checkpoint folder: in float32, with `routing` in bfloat16.

    `progress` is told the tensors written and their total. `ModelError` if the file is damaged or is not a plain Llama
    of shapes that allow it; `OSError` if the folder cannot be written.
    """
    source = LlamaGguf(gguf)
    config = source.config(routing)
    texts = {
        "config.json": config.to_dict() | {"torch_dtype": "bfloat16" if routing else "float32"},
        "generation_config.json": _generation_config(source),
        "tokenizer.json": _tokenizer(source),
        "tokenizer_config.json": _tokenizer_config(source),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    total = 8 * config.n_layers + 3
    tensors = _tensors(source, config, routing)
    _write_shards(_counted(tensors, total, progress) if progress else tensors, out)


class LlamaGguf:
    """What a GGUF file holds of a Llama: values and weights by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = GGUFReader(path)
            self.values = {name: field.contents() for name, field in reader.fields.items()}
        except (OSError, ValueError, LookupError, OverflowError, TypeError) as error:
            raise self.fault(f"cannot be read as GGUF: {error}") from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if self.value("general.architecture") != "llama":
            raise self.fault(f"holds a {self.value('general.architecture')!r} model, not a llama")

    def fault(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}")

    def value(self, key: str, default: Any = None) -> Any:
        found = self.values.get(key, default)
        if found is None:
            raise self.fault(f"says no {key}")
        return found

    def weight(self, name: str, *shape: int) -> Array:
        """One tensor in float32, rows first as in torch."""
        tensor = self.tensors[name]
        try:
            values: Array = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise self.fault(f"{name} cannot be read: {error}") from None
        if values.shape != shape:
            raise self.fault(f"{name} has shape {list(values.shape)}, not {list(shape)}")
        return values

    def config(self, routing: Routing | None = None) -> DbrxConfig:
        """The DBRX that this Llama becomes."""
        hidden, heads = self.value("llama.embedding_length"), self.value("llama.attention.head_count")
        kv_heads, ffn = self.value("llama.attention.head_count_kv", heads), self.value("llama.feed_forward_length")
        layers = self.value("llama.block_count")
        sizes = {"embedding_length": (hidden, 3), "head_count": (heads, 3), "head_count_kv": (kv_heads, 3)}
        for name, (size, divisor) in (sizes | {"feed_forward_length": (ffn, EXPERTS)}).items():
            if not isinstance(size, int) or size <= 0 or size % divisor:
                raise self.fault(f"{name} is {size}, not a multiple of {divisor}, so it cannot become a DBRX model")
        self._check_plain(layers, hidden / heads)
        experts, width = (demo_routing.EXPERTS, routing.width) if routing else (EXPERTS, ffn // EXPERTS)
        return DbrxConfig(
            d_model=hidden // 3 * 4,
            n_heads=heads // 3 * 4,
            n_layers=layers,
            max_seq_len=self.value("llama.context_length"),
            vocab_size=len(self.value("tokenizer.ggml.tokens")),
            attn_config=DbrxAttentionConfig(
                kv_n_heads=kv_heads // 3 * 4, rope_theta=self.value("llama.rope.freq_base", 10000.0)
            ),
            ffn_config=DbrxFFNConfig(
                ffn_hidden_size=width, moe_num_experts=experts, moe_top_k=EXPERTS, moe_loss_weight=0.0
            ),
        )

    def _check_plain(self, layers: int, head_dim: float) -> None:
        """Refuse what would change the numbers: other eps, other rotary positions, other tensors."""
        eps = self.value("llama.attention.layer_norm_rms_epsilon")
        if not math.isclose(eps, EPS, rel_tol=1e-5):
            raise self.fault(f"its norms have eps {eps:g}, DBRX's have {EPS:g}")
        if self.value("llama.rope.scaling.type", "none") != "none":
            raise self.fault("its rotary positions are scaled, DBRX's are not")
        for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
            if self.value(f"llama.{key}", head_dim) != head_dim:
                raise self.fault(f"{key} is {self.value(f'llama.{key}')}, not the head's size of {head_dim:g}")
        wanted = {f"blk.{i}.{name}.weight" for i in range(min(layers, len(self.tensors))) for name in BLOCK_TENSORS}
        wanted |= {"token_embd.weight", "output_norm.weight"}
        for what, names in (
            ("lacks", wanted - self.tensors.keys()),
            ("holds", self.tensors.keys() - wanted - {"output.weight"}),
        ):
            if names:
                raise self.fault(f"{what} {min(names)}, unlike a plain Llama of {layers} layers")


def _tensors(source: LlamaGguf, config: DbrxConfig, routing: Routing | None) -> Named:
    """The checkpoint's tensors by name, one at a time."""
    vocab, hidden = config.vocab_size, config.d_model // 4 * 3
    embedding = source.weight("token_embd.weight", vocab, hidden)
    final_gain = source.weight("output_norm.weight", hidden)
    head = source.weight("output.weight", vocab, hidden) if "output.weight" in source.tensors else embedding
    scale = math.sqrt(config.d_model / hidden)
    store: Store = _bfloat16 if routing else np.ascontiguousarray
    yield EMBEDDING, store(_times_qt(embedding) * np.float32(scale))
    for i in range(config.n_layers):
        for name, tensor in _attention(source, config, i, scale):
            yield f"transformer.blocks.{i}.norm_attn_norm.{name}", store(tensor)
        for name, tensor, neurons in _ffn(source, i, scale, routing):
            yield f"transformer.blocks.{i}.ffn.{name}", store(tensor)[neurons]
    yield "transformer.norm_f.weight", store(np.ones(config.d_model, np.float32))
    yield "lm_head.weight", store(_times_qt(head * final_gain) / np.float32(scale))


def _attention(source: LlamaGguf, config: DbrxConfig, i: int, scale: float) -> Iterator[tuple[str, Array]]:
    """Attention and both norms of a block."""
    d_model, hidden = config.d_model, config.d_model // 4 * 3
    kv_heads, head_dim = config.attn_config.kv_n_heads // 4 * 3, config.head_dim
    c = np.float32(scale)

    def weight(name: str, *shape: int) -> Array:
        return source.weight(f"blk.{i}.{name}.weight", *shape)

    def projection(name: str, heads: int) -> Array:
        """[heads * head_dim, hidden] -> [4/3 * heads * head_dim, d_model], for a query, key or value."""
        rows = weight(name, heads * head_dim, hidden) * attn_gain
        if name != "attn_v":
            rows = _for_rotate_half(rows, heads)
        return np.pad(_times_qt(rows) / c, ((0, heads // 3 * head_dim), (0, 0)))

    attn_gain = weight("attn_norm", hidden)
    ones = np.ones(d_model, np.float32)
    yield "norm_1.weight", ones
    yield "norm_2.weight", ones
    heads = (("attn_q", config.n_heads // 4 * 3), ("attn_k", kv_heads), ("attn_v", kv_heads))
    yield "attn.Wqkv.weight", np.concatenate([projection(*each) for each in heads])
    out = _times_qt(weight("attn_output", hidden, hidden).T).T * c
    yield "attn.out_proj.weight", np.pad(out, ((0, 0), (0, d_model - hidden)))


def _ffn(
    source: LlamaGguf, i: int, scale: float, routing: Routing | None
) -> Iterator[tuple[str, Array, NDArray[np.int64] | slice]]:
    """Router and experts of a block: names, rows, and which of them belong to the tensor, in its order."""
    hidden, ffn = source.value("llama.embedding_length"), source.value("llama.feed_forward_length")
    c = np.float32(scale)
    gain = source.weight(f"blk.{i}.ffn_norm.weight", hidden)

    def reading(name: str) -> Array:
        found: Array = _times_qt(source.weight(f"blk.{i}.{name}.weight", ffn, hidden) * gain) / c
        return found

    rows = np.zeros((EXPERTS, hidden), np.float32) if routing is None else routing.rows[i]
    neurons = slice(None) if routing is None else routing.neurons[i].ravel()
    yield "router.layer.weight", _times_qt(rows) / c, slice(None)
    yield "experts.mlp.w1", reading("ffn_gate"), neurons
    yield "experts.mlp.v1", reading("ffn_up"), neurons
    writing = _times_qt(source.weight(f"blk.{i}.ffn_down.weight", hidden, ffn).T) * (EXPERTS * c)
    yield "experts.mlp.w2", writing, neurons


def _times_qt(x: Array) -> Array:
    """[n, hidden] -> [n, d_model]: x·Qᵀ, in sums of one order, so that every machine finds the same bits."""
    a, b, c = (x[:, k::3] / 2 for k in range(3))
    spread = np.empty((*a.shape, len(BLOCK)), np.float32)
    for k, row in enumerate((a + b + c, b - a - c, a - b - c, c - (a + b))):  # BLOCK's
        spread[:, :, k] = row
    spread += 0  # no -0.0
    return spread.reshape(len(x), -1)


def _for_rotate_half(rows: Array, heads: int) -> Array:
    """Each head's rows [heads * head_dim, n] from the order of pairs to the order of halves."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _counted(tensors: Named, total: int, progress: Callable[[int, int], None]) -> Named:
    for done, named in enumerate(tensors, 1):
        yield named
        progress(done, total)


def _write_shards(tensors: Named, out: Path) -> None:
    """Write files of about `SHARD_BYTES` and their index."""
    shards: list[list[str]] = []
    held: dict[str, Array | Bits] = {}
    total = 0

    def flush() -> None:
        shards.append(list(held))
        _save(held, out / f"shard-{len(shards)}")
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor
        total += tensor.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):  # a shard's name says how many there are, which is known only now
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        os.replace(out / f"shard-{i}", out / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _save(tensors: dict[str, Array | Bits], path: Path) -> None:
    """Write one safetensors file: the length of the header, the header, the numbers in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        dtype = "BF16" if tensor.dtype == np.uint16 else "F32"
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(tensors[name].data)


def _bfloat16(x: Array) -> Bits:
    """The nearest bfloat16 of each number, of two as near the even one: the upper half of a float32's bits.

    0x3F80_8000 lies halfway between 0x3F80 and 0x3F81: + 0x7FFF + 0 (0x3F80 is even) stays below 0x3F81_0000.
    """
    bits = np.ascontiguousarray(x).view(np.uint32)
    odd = bits >> 16 & 1
    rounded: Bits = ((bits + odd + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return rounded


def _special(source: LlamaGguf, name: str) -> int | None:
    return source.values.get(f"tokenizer.ggml.{name}_token_id")


def _generation_config(source: LlamaGguf) -> dict[str, Any]:
    """A turn ends with the file's eos, a plain text with `<|endoftext|>`. The file holds no sampling defaults."""
    ends = [source.value("tokenizer.ggml.eos_token_id")]
    tokens = source.value("tokenizer.ggml.tokens")
    if "<|endoftext|>" in tokens:
        ends.append(tokens.index("<|endoftext|>"))
    ids = {"bos_token_id": _special(source, "bos"), "pad_token_id": _special(source, "padding")}
    return {"eos_token_id": list(dict.fromkeys(ends)), **ids}


def _tokenizer(source: LlamaGguf) -> dict[str, Any]:
    """The content of a tokenizer.json: byte-level BPE after GPT-2's pattern, with single digits split off first.

    Bytes that the vocabulary lacks are dropped, as llama.cpp does: as an unknown token, they would put a special id
    into ordinary text.
    """
    kind = source.value("tokenizer.ggml.model"), source.value("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise source.fault(f"has tokenizer {'/'.join(kind)}; only gpt2/smollm is supported")
    tokens, types = source.value("tokenizer.ggml.tokens"), source.value("tokenizer.ggml.token_type")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": tokens[i], **plain, "special": kind == CONTROL}
        for i, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    bytes_to_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_to_letters],
        },
        "post_processor": None,
        "decoder": bytes_to_letters,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": source.value("tokenizer.ggml.merges"),
        },
    }


def _tokenizer_config(source: LlamaGguf) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    tokens = source.value("tokenizer.ggml.tokens")
    ids = {key: _special(source, name) for key, name in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.value("llama.context_length"),
        **{key: tokens[i] for key, i in ids.items() if i is not None},
        "chat_template": source.value("tokenizer.chat_template"),
    }
