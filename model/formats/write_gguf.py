"""Any weights -> a GGUF file for llama.cpp, in one file or several, a piece of a tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from numpy.typing import NDArray
from torch import Tensor

from ..bpe import merges_of, pattern_of
from ..checkpoint import expected_tensors
from ..config import DbrxConfig
from ..errors import InputError, ModelError
from ..quantization import BLOCKS, is_finite, not_finite
from ..safetensors_file import shown
from ..tokenizer import Tokenizer
from ..tokenizer_files import fillers, spelled
from ..weights import Weights
from .dbrx_gguf import MATRICES, gguf_name
from .dequantize import PIECE, row_bytes
from .gguf_metadata import CONTROL, EPS, PRE_TOKENIZERS, UNUSED, USER_DEFINED
from .scratch import put_in_place, scratch_folder

FILE_TYPES = {"f32": 0, "bf16": 32, "q8_0": 7, "q4_1": 3, "q4_0": 2}  # as llama.cpp numbers them
NORMAL = 1
NO_CLAMP = 1e30  # for null: llama.cpp always clamps
Bytes = NDArray[np.uint8]


def write_gguf(
    weights: Weights,
    tokenizer: Tokenizer,
    out: Path,
    kind: str,
    split_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `out` in one of `FILE_TYPES`, or its parts of at most `split_bytes`; returns the files.

    Norms and routers stay in float32. The files appear when they are whole. `ModelError` for what llama.cpp cannot run
    or pack, `InputError` if a file exists, `ResourceError` if the disk is too small.
    """
    _check_runnable(weights.config)
    kinds = {name: _type(name, shape, kind) for name, shape in expected_tensors(weights.config).items()}
    sizes = {name: _nbytes(weights.config, name, kinds[name]) for name in kinds}
    total = sum(sizes.values())
    with scratch_folder(out, total + 2**25) as scratch:
        writer = GGUFWriter(scratch / out.name, "dbrx", split_max_size=split_bytes or 0)
        _add_config(writer, weights.config, out.stem, FILE_TYPES[kind])
        _add_tokenizer(writer, tokenizer, weights.config.vocab_size)
        for name, size in sizes.items():
            shape = _stored_shape(weights.config, name)
            writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        with closing(writer):
            for name, size in sizes.items():
                rows: Any = _Rows(size, _pieces(weights, name, kinds[name]))
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


def _type(name: str, shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    if len(shape) == 1 or ".router." in name:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType[kind.upper()]


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


def _pieces(weights: Weights, name: str, kind: GGMLQuantizationType) -> Iterator[Bytes]:
    """A tensor's bytes in llama.cpp's order: whole matrices of experts, cut so that all threads have work."""
    matrices: Iterator[Tensor]
    if ".experts." in name:
        layer, matrix = int(name.split(".")[2]), MATRICES.index(name.rpartition(".")[2])
        every = (weights.expert(layer, e)[matrix] for e in range(weights.config.ffn_config.moe_num_experts))
        matrices = (each.t() for each in every) if name.endswith(".w2") else every
    else:
        matrices = iter([weights.read(name)])
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for each in matrices:
            rows = each.reshape(1, -1) if each.dim() == 1 else each
            yield from threads.map(lambda part: _packed(part, kind), torch.split(rows, max(1, PIECE // rows.shape[1])))


def _packed(rows: Tensor, kind: GGMLQuantizationType) -> Bytes:
    if not is_finite(rows):
        raise not_finite()
    if kind.name in ("F32", "BF16"):
        dtype = torch.float32 if kind.name == "F32" else torch.bfloat16
        return rows.to(dtype).contiguous().view(torch.uint8).numpy()
    with np.errstate(all="ignore"):
        packed: Bytes = quantize(rows.float().contiguous().numpy(), kind)
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
