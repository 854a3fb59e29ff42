"""Any weights -> a checkpoint in Databricks' layout, an expert at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import MATRICES, expected_tensors
from ..errors import ModelError, NotFiniteError
from ..quantization import is_finite
from ..weights import Weights
from .scratch import put_in_place, scratch_folder

SHARD_BYTES = 5_000_000_000
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
EXPERTS = ".ffn.experts.mlp."


def companions(source: Path, rows: int) -> Callable[[Path], None]:
    """What belongs beside the weights of `source`, read now: the function writes tokenizer and generation settings.

    `ModelError` if it does not fit a vocabulary of so many rows.
    """
    from ..generation_config import GenerationConfig
    from ..tokenizer import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.require_rows(rows, source)
    generation = GenerationConfig.from_source(source)
    for fault in generation.faults.values():
        raise ModelError(fault.message, "mend the file")  # no flag replaces a value here

    def finish(written: Path) -> None:
        tokenizer.save_pretrained(written)
        generation.save(written)

    return finish


class Place(NamedTuple):
    """Where a tensor goes: a number of a shard, and the first byte in its data."""

    shard: int
    start: int


def write_checkpoint(
    weights: Weights,
    out: Path,
    dtype: torch.dtype,
    finish: Callable[[Path], None],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `weights` as a checkpoint folder `out` that appears when it is whole.

    `finish` is given the folder before that, for the tokenizer's files. `progress` hears bytes written and their total.
    `InputError` if `out` exists, `ResourceError` if the disk is too small.
    """
    sizes = {name: _product(shape) * dtype.itemsize for name, shape in expected_tensors(weights.config).items()}
    total = sum(sizes.values())
    places, n_shards = _layout(sizes)
    files = [f"model-{i + 1:05}-of-{n_shards:05}.safetensors" for i in range(n_shards)]
    with scratch_folder(out, total + 2**26) as scratch:
        folder = scratch / "checkpoint"
        folder.mkdir()
        with ExitStack() as stack:
            shards = [stack.enter_context((folder / file).open("wb")) for file in files]
            starts = [_write_header(shard, i, places, weights, dtype) for i, shard in enumerate(shards)]
            done = 0
            for name, offset, tensor in _pieces(weights, dtype):
                if not is_finite(tensor):
                    why = f"{name} holds numbers that are not finite, or too large for {NAMES[dtype]}"
                    raise NotFiniteError(why, "check the files with `dbrx download MODEL --verify`")
                shard, start = places[name]
                _write_at(shards[shard], starts[shard] + start + offset, tensor)
                done += tensor.nbytes
                if progress:
                    progress(done, total)
        index = {"metadata": {"total_size": total}, "weight_map": {n: files[p.shard] for n, p in places.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        config = weights.config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        finish(folder)
        put_in_place(scratch, {"checkpoint": out})


def _product(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _layout(sizes: dict[str, int]) -> tuple[dict[str, Place], int]:
    """Each tensor's place, and the number of shards."""
    places: dict[str, Place] = {}
    shard = used = 0
    for name, size in sizes.items():
        if used and used + size > SHARD_BYTES:
            shard, used = shard + 1, 0
        places[name] = Place(shard, used)
        used += size
    return places, shard + 1


def _write_header(file: BinaryIO, shard: int, places: dict[str, Place], weights: Weights, dtype: torch.dtype) -> int:
    """Write the header of a shard; returns where its data begins."""
    shapes = expected_tensors(weights.config)
    entries = {
        name: {
            "dtype": NAMES[dtype],
            "shape": shapes[name],
            "data_offsets": [place.start, place.start + _product(shapes[name]) * dtype.itemsize],
        }
        for name, place in places.items()
        if place.shard == shard
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 64)
    file.write(len(header).to_bytes(8, "little") + header)
    file.flush()
    return 8 + len(header)


def _pieces(weights: Weights, dtype: torch.dtype) -> Iterator[tuple[str, int, Tensor]]:
    """Names, the bytes of the tensor that come before, and values: whole tensors, but of stacks one expert."""
    for name in expected_tensors(weights.config):
        if EXPERTS not in name:
            yield name, 0, weights.read(name, dtype)
    ffn = weights.config.ffn_config
    for layer in range(weights.config.n_layers):
        for expert in range(ffn.moe_num_experts):
            for matrix, values in zip(MATRICES, weights.expert(layer, expert), strict=True):
                values = values.to(dtype)
                yield f"transformer.blocks.{layer}{EXPERTS}{matrix}", expert * values.nbytes, values


def _write_at(file: BinaryIO, start: int, tensor: Tensor) -> None:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    while len(data):  # one call writes at most 2 GiB
        written = os.pwrite(file.fileno(), data, start)
        data, start = data[written:], start + written
