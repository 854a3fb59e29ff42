"""Keys and values in a file: safetensors that say what they were made by and carry a checksum.

A file is one block, or several behind one another where it grows as a reply comes. A block is a valid safetensors file:
metadata, tensors, and as the last of them the SHA-256 of every byte before it. So a block is whole or refused, whatever
happened to the file; it is trusted for no more than that its bytes are those that were written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .kv_cache import KVRow
from .safetensors_file import HEADER

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

PROGRAM = {"program": "dbrx"}  # the first entry of every file, by which one is known even if it is damaged
DIGEST = "sha256"
TYPES = {
    "U8": torch.uint8, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}


class UnusableState(InputError):
    """A saved file that is damaged, or was made by something else; the message is a clause about the file."""


class Block(NamedTuple):
    metadata: dict[str, str]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """What one token's keys and values look like in a network."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]  # one a layer

    @classmethod
    def of(cls, network: DbrxForCausalLM) -> Layout:
        """Of a loaded network. Weights that wait elsewhere (on the meta device) are computed where ids belong."""
        weights = (next(block.parameters()) for block in network.transformer.blocks)
        devices = (network.device if weight.is_meta else weight.device for weight in weights)
        config = network.config
        return cls(config.attn_config.kv_n_heads, config.head_dim, network.kv_dtype, tuple(devices))


def write_block(file: BinaryIO, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Append a block; the tensors are not copied where they lie contiguously in CPU memory."""
    header: dict[str, object] = {"__metadata__": PROGRAM | dict(metadata)}
    position = 0
    digest = hashlib.sha256()
    shapes = {name: (NAMES[t.dtype], list(t.shape), t.nbytes) for name, t in tensors.items()}
    for name, (dtype, shape, nbytes) in (shapes | {DIGEST: ("U8", [digest.digest_size], digest.digest_size)}).items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text, *map(_bytes, tensors.values())]
    for part in parts:
        digest.update(part)
        file.write(part)
    file.write(digest.digest())


def read_block(file: BinaryIO, left: int) -> Block | None:
    """The next block of a file with `left` bytes to its end, None at its end; `UnusableState` if it is damaged."""
    start = file.read(8)
    if not start:
        return None
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(HEADER.nbytes, left - 8):
        raise UnusableState("is damaged, or was not written by this program")
    text = file.read(length)
    metadata, shapes = _header(text, left - 8 - length)
    digest = hashlib.sha256(start + text)
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        tensors[name] = torch.empty(shape, dtype=dtype)
        if name == DIGEST:
            expected = digest.digest()
        raw = _bytes(tensors[name])
        file.readinto(raw)  # type: ignore[attr-defined]
        digest.update(raw)
    if bytes(_bytes(tensors.pop(DIGEST))) != expected:
        raise UnusableState("is damaged: its checksum is wrong")
    return Block(metadata, tensors)


def _header(text: bytes, room: int) -> tuple[dict[str, str], dict[str, tuple[torch.dtype, list[int]]]]:
    """Metadata, and type and shape of each tensor in order; the last must be the checksum."""
    try:
        entries = json.loads(text)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__").items()}
        shapes, position = {}, 0
        for name, entry in entries.items():
            dtype, shape = TYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
            end = position + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [position, end] or min(shape) < 0 or end > room:
                raise ValueError(name)
            shapes[name], position = (dtype, shape), end
        if name != DIGEST or shapes[name] != (torch.uint8, [hashlib.sha256().digest_size]):
            raise ValueError(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnboundLocalError):
        raise UnusableState("is damaged, or was not written by this program") from None
    return metadata, shapes


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def cache_tensors(row: KVRow, start: int, stop: int) -> dict[str, Tensor]:
    """Keys and values of a row's tokens from `start` to `stop`, [tokens, kv_heads, head_dim] each."""
    pairs = [row.read(layer, start, stop) for layer in range(row.n_layers)] if stop > start else []
    return {f"{kind}.{layer}": part for layer, pair in enumerate(pairs) for kind, part in zip("kv", pair, strict=True)}


@torch.inference_mode()
def extend_row(row: KVRow, tensors: dict[str, Tensor], tokens: int, layout: Layout) -> None:
    """Append what `cache_tensors` gave; `UnusableState` if it is not of this layout. Empties `tensors` as it goes."""
    shape = tokens, layout.kv_heads, layout.head_dim
    for layer, device in enumerate(layout.devices):
        parts = [tensors.pop(f"{kind}.{layer}", None) for kind in "kv"]
        for part in parts:
            if part is None or part.shape != shape or part.dtype != layout.dtype:
                raise UnusableState("holds keys and values of another shape")
        k, v = (part.to(device) for part in parts if part is not None)
        row.write(layer, row.length, k, v)
    row.length += tokens


class SavedCache(NamedTuple):
    """Keys and values of `ids`, and what came out of the network after the first `logits_at` of them [1, vocab]."""

    row: KVRow
    ids: list[int]
    logits_at: int
    logits: Tensor | None


def save_cache(file: BinaryIO, saved: SavedCache, made_by: Mapping[str, str]) -> None:
    """Write one row's keys and values as far as `ids` go, with all that they depend on: names -> values."""
    tensors = {"ids": torch.tensor(saved.ids, dtype=torch.long), **cache_tensors(saved.row, 0, len(saved.ids))}
    if saved.logits is not None:
        tensors["logits"] = saved.logits
    metadata = {"made_by": json.dumps(dict(made_by)), "logits_at": str(saved.logits_at)}
    write_block(file, metadata, tensors)


def load_cache(file: BinaryIO, size: int, made_by: Mapping[str, str], layout: Layout) -> SavedCache:
    """Read a whole file of `size` bytes; `UnusableState` names the first thing in which it differs from `made_by`."""
    block = read_block(file, size)
    if block is None or file.read(1):
        raise UnusableState("is damaged: it has not the length that it tells")
    require_same(block.metadata, made_by)
    tensors, device = block.tensors, layout.devices[-1]
    ids = tensors.pop("ids").tolist()
    row = KVRow(len(layout.devices))
    logits = tensors.pop("logits", None)
    extend_row(row, tensors, len(ids), layout)
    at = int(block.metadata["logits_at"])
    return SavedCache(row, ids, at, None if logits is None else logits.to(device))


def require_same(metadata: Mapping[str, str], made_by: Mapping[str, str]) -> None:
    """`UnusableState` unless `made_by` of the metadata says the same as the one given, thing by thing."""
    try:
        before = dict(json.loads(metadata["made_by"]))
    except (ValueError, KeyError, TypeError):
        raise UnusableState("does not say what it was made by") from None
    for name in [*made_by, *before]:
        if before.get(name) != made_by.get(name):
            raise UnusableState(f"was made with another {name}")


def starts_like_one(head: bytes) -> bool:
    """Whether a file that begins so (its first 64 bytes) is one of these, cut there or damaged: one byte in eight is.

    The length of the header is before it, in 8 bytes of any value.
    """
    start = json.dumps({"__metadata__": PROGRAM}, separators=(",", ":")).encode()[:-2]
    shown = head[8:][: len(start)]
    return len(shown) > 0 and 8 * sum(a != b for a, b in zip(shown, start, strict=False)) <= len(shown)
