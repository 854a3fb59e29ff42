"""Any weights -> a GGUF file for llama.cpp, in one file or several, a piece of a tensor at a time."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor

from ..bpe import merges_of, pattern_of
from ..checkpoint import MATRICES, expected_tensors
from ..config import DbrxConfig
from ..errors import InputError, ModelError
from ..packing import threads
from ..quantization import BLOCKS, blocks, is_finite, not_finite
from ..quantization.k_quants import PIECE
from ..safetensors_file import shown
from ..tokenizer import Tokenizer
from ..tokenizer_files import fillers, spelled
from ..weights import Weights
from .dbrx_gguf import gguf_name
from .dequantize import row_bytes
from .gguf_metadata import CONTROL, EPS, PRE_TOKENIZERS, UNUSED, USER_DEFINED
from .scratch import put_in_place, scratch_folder

if TYPE_CHECKING:
    from ..calibration import Importance


class Kind(NamedTuple):
    """A type of files, as llama-quantize knows it."""

    number: int
    usual: str  # ggml's type of a matrix
    finer: str | None = None  # of the head, and of what is most sensitive in `_is_finer`'s layers


KINDS = {
    "f32": Kind(0, "F32"),
    "bf16": Kind(32, "BF16"),
    "q8_0": Kind(7, "Q8_0"),
    "q6_k": Kind(18, "Q6_K"),
    "q5_k_m": Kind(17, "Q5_K", "Q6_K"),
    "q5_k": Kind(16, "Q5_K"),
    "q4_k_m": Kind(15, "Q4_K", "Q6_K"),
    "q4_k": Kind(14, "Q4_K"),
    "q4_1": Kind(3, "Q4_1"),
    "q4_0": Kind(2, "Q4_0"),
}
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # llama-quantize's, where 256 does not divide a row
NORMAL = 1
NO_CLAMP = 1e30  # for null: llama.cpp always clamps
Bytes = NDArray[np.uint8]
Squares = dict[tuple[int, int], tuple[Tensor, Tensor]]  # of a layer and an expert, as `Importance` has them


def write_gguf(
    weights: Weights,
    tokenizer: Tokenizer,
    out: Path,
    kind: str,
    split_bytes: int | None = None,
    importance: Importance | None = None,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write `out` in one of `KINDS`, or its parts of at most `split_bytes`; returns the files.

    Norms and routers stay in float32; K-quants of experts are fitted to `importance`; `notice` hears which matrices
    fall back to another type. The files appear when they are whole. `ModelError` for what llama.cpp cannot run or
    pack, `InputError` if a file exists, `ResourceError` if the disk is too small.
    """
    _check_runnable(weights.config)
    kinds = _types(weights.config, KINDS[kind], notice)
    sizes = {name: _nbytes(weights.config, name, kinds[name]) for name in kinds}
    total = sum(sizes.values())
    squares = _squares(weights.config, importance) if importance else {}
    with scratch_folder(out, total + 2**25) as scratch:
        writer = GGUFWriter(scratch / out.name, "dbrx", split_max_size=split_bytes or 0)
        _add_config(writer, weights.config, out.stem, KINDS[kind].number)
        _add_tokenizer(writer, tokenizer, weights.config.vocab_size)
        for name, size in sizes.items():
            shape = _stored_shape(weights.config, name)
            writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        with closing(writer), threads(torch.get_num_threads()) as pool:
            for name, size in sizes.items():
                rows: Any = _Rows(size, _pieces(weights, name, kinds[name], squares, pool))
                writer.write_tensor_data(rows)
                done += size
                if progress:
                    progress(done, total)
        files = {path.name: out.with_name(path.name) for path in sorted(scratch.iterdir())}
        for path in files.values():
            if os.path.lexists(path):
                raise InputError(f"{path} exists already", "name one that does not, or remove it")
        put_in_place(scratch, files)
    return list(files.values())


class _Rows:
    """What the writer takes for an array: a size, and a way to write itself."""

    def __init__(self, nbytes: int, pieces: Iterator[Bytes]) -> None:
        self.nbytes = nbytes
        self._pieces = pieces

    def tofile(self, file: BinaryIO) -> None:
        for piece in self._pieces:
            file.write(np.ascontiguousarray(piece).data)


def _check_runnable(config: DbrxConfig) -> None:
    """llama.cpp's dbrx has no key for these."""
    ffn = config.ffn_config
    if ffn.activation != "silu" or ffn.moe_normalize_expert_weights != 1:
        raise ModelError(
            f"llama.cpp runs DBRX with silu and experts' weights of sum 1 only, this model has {ffn.activation} and "
            f"moe_normalize_expert_weights {ffn.moe_normalize_expert_weights}"
        )


def _types(config: DbrxConfig, kind: Kind, notice: Callable[[str], None]) -> dict[str, GGMLQuantizationType]:
    """ggml's type of each tensor; `notice` hears of those that `FALLBACKS` gives."""
    types: dict[str, GGMLQuantizationType] = {}
    fallen: Counter[tuple[int, str, str]] = Counter()
    for name, shape in expected_tensors(config).items():
        wanted = kind.finer if kind.finer and _is_finer(name, config.n_layers) else kind.usual
        columns = _stored_shape(config, name)[-1]
        if len(shape) == 1 or ".router." in name:
            wanted = "F32"
        elif wanted in FALLBACKS and columns % BLOCKS[wanted].inputs:
            fallen[columns, wanted, FALLBACKS[wanted]] += 1
            wanted = FALLBACKS[wanted]
        types[name] = GGMLQuantizationType[wanted]
    for (columns, wanted, other), count in fallen.items():
        notice(f"{count} matrices with rows of {columns}, no multiple of 256, become {other} in place of {wanted}")
    return types


def _is_finer(name: str, layers: int) -> bool:
    """Whether llama-quantize has a tensor in more bits in its mixtures "_M": 20 of DBRX's 40 layers, and the head."""
    if not name.endswith((".Wqkv.weight", ".w2")):
        return name == "lm_head.weight"
    layer, eighth = int(name.split(".")[2]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _stored_shape(config: DbrxConfig, name: str) -> tuple[int, ...]:
    """As llama.cpp wants it: experts on a dimension of their own, w2 transposed."""
    ffn, d = config.ffn_config, config.d_model
    if ".experts." not in name:
        return expected_tensors(config)[name]
    matrix = (d, ffn.ffn_hidden_size) if name.endswith(".w2") else (ffn.ffn_hidden_size, d)
    return (ffn.moe_num_experts, *matrix)


def _nbytes(config: DbrxConfig, name: str, kind: GGMLQuantizationType) -> int:
    *rows, columns = _stored_shape(config, name)
    block = BLOCKS.get(kind.name)
    if block and columns % block.inputs:
        raise ModelError(
            f"{name} has rows of {columns}, which {kind.name.lower()} cannot pack in blocks of {block.inputs}",
            "choose --type bf16 or f32",
        )
    return int(np.prod(rows, dtype=np.int64)) * row_bytes(kind.name, columns)


def _squares(config: DbrxConfig, importance: Importance) -> Squares:
    """All of them, before threads share the cores: a text goes through the network for it."""
    every = itertools.product(range(config.n_layers), range(config.ffn_config.moe_num_experts))
    return {(layer, expert): importance.squares(layer, expert) for layer, expert in every}


def _pieces(
    weights: Weights, name: str, kind: GGMLQuantizationType, squares: Squares, pool: ThreadPoolExecutor
) -> Iterator[Bytes]:
    """A tensor's bytes in llama.cpp's order: whole matrices of experts, cut so that all threads have work."""
    for each, known in _matrices(weights, name, squares):
        rows = each.reshape(1, -1) if each.dim() == 1 else each
        parts = torch.split(rows, max(1, PIECE // rows.shape[1]))
        yield from pool.map(partial(_packed, kind=kind, squares=known), parts)


def _matrices(weights: Weights, name: str, squares: Squares) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A tensor's matrices [outputs, inputs], each with the mean squares of its inputs where they are known."""
    if ".experts." not in name:
        yield weights.read(name), None
        return
    layer, matrix = int(name.split(".")[2]), MATRICES.index(name.rpartition(".")[2])
    last = name.endswith(".w2")
    for e in range(weights.config.ffn_config.moe_num_experts):
        each = weights.expert_matrix(layer, e, matrix)
        yield each.t() if last else each, squares[layer, e][last] if squares else None


def _packed(rows: Tensor, kind: GGMLQuantizationType, squares: Tensor | None) -> Bytes:
    if not is_finite(rows):
        raise not_finite()
    if kind.name in ("F32", "BF16"):
        dtype = torch.float32 if kind.name == "F32" else torch.bfloat16
        return rows.to(dtype).contiguous().view(torch.uint8).numpy()
    packed: Bytes = blocks.quantize(rows, kind.name, squares).values.numpy()
    return packed


def _add_config(writer: GGUFWriter, config: DbrxConfig, name: str, file_type: int) -> None:
    attn, ffn = config.attn_config, config.ffn_config
    writer.add_name(name)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(ffn.ffn_hidden_size)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(attn.kv_n_heads)
    writer.add_rope_freq_base(attn.rope_theta)
    writer.add_clamp_kqv(NO_CLAMP if attn.clip_qkv is None else attn.clip_qkv)
    writer.add_expert_count(ffn.moe_num_experts)
    writer.add_expert_used_count(ffn.moe_top_k)
    writer.add_layer_norm_eps(EPS)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Tokens, merges, special ids and template; ids without a token are named as llama.cpp's converter names them."""
    vocabulary = tokenizer.vocabulary
    pre = next((name for name, value in PRE_TOKENIZERS.items() if pattern_of(value) == vocabulary.pattern), None)
    if pre is None:
        raise ModelError(
            f"llama.cpp has no name for the way in which this tokenizer cuts text: {shown(vocabulary.pattern)}",
            "export a model with DBRX's own tokenizer, or put DBRX's tokenizer.json into the folder",
        )
    named = {spelled(token): i for token, i in vocabulary.ids.items()}
    named |= {name: added.id for name, added in vocabulary.added.items()}
    tokens, types = [""] * vocab_size, [UNUSED] * vocab_size
    for name, i in (named | fillers(named, vocab_size)).items():
        if i < vocab_size:
            tokens[i] = name
    for i in vocabulary.ids.values():
        if i < vocab_size:
            types[i] = NORMAL
    for added in vocabulary.added.values():
        if added.id < vocab_size:
            types[added.id] = CONTROL if added.special else USER_DEFINED
    known = {token for token, i in vocabulary.ids.items() if i < vocab_size}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    pairs = ((a, b) for a, b in merges_of(vocabulary) if a + b in known)
    writer.add_token_merges([f"{spelled(a)} {spelled(b)}" for a, b in pairs])
    ends = [end for end in tokenizer.eos_token_ids if end < vocab_size]
    ids = {
        writer.add_eos_token_id: next(iter(ends), None),
        writer.add_bos_token_id: next((i for i in (tokenizer.bos_token_id, *ends) if i is not None), None),
        writer.add_eot_token_id: tokenizer.special_tokens.get("<|im_end|>"),
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, token_id in ids.items():
        if token_id is not None and token_id < vocab_size:
            add(token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template.text)
