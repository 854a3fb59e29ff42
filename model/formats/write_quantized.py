"""Any weights -> a checkpoint in one of `SCHEMES`, an expert at a time, taken up again where it was interrupted."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from ..checkpoint import EMBEDDING, INDEX_NAME, MATRICES, expected_tensors
from ..errors import InputError, ModelError, ResourceError
from ..kernels import choose, experts_of
from ..machine import available_memory
from ..packing import at_once, freed_at_once, in_order, read_expert, threads
from ..quantization import DENSE as DENSE_SCHEME
from ..quantization import SCHEMES, is_finite, not_finite, quantize
from ..safetensors_file import BITS, opened, read_header
from ..weights import QuantizedExpert, QuantizedMatrix, Weights
from .quantized import DENSE, EXPERT, METHOD, STACKED, VERSION, layout

if TYPE_CHECKING:
    from ..calibration import Calibration

Tensors = Iterator[tuple[str, Tensor]]
ROOM = 2**26  # bytes for headers, tokenizer and the like


class Writer:
    """Writes one checkpoint: a file a layer, and one for embedding, last norm and head."""

    def __init__(
        self,
        weights: Weights,
        out: Path,
        kind: str,
        group: int | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """group: one of the scheme's, None for the usual one.

        `InputError` if `out` exists or the weights are in few bits already.
        """
        if os.path.lexists(out):
            raise InputError(f"{out} exists already", "name one that does not, or remove it")
        if weights.quantization != "none":
            raise InputError(f"{weights.source} is quantized already", "give the checkpoint that it was made from")
        self.weights, self.out, self.kind = weights, out, kind
        self.group = (group or SCHEMES[kind].group) if SCHEMES[kind].groups else 0
        self.work = out.absolute().parent / f".{out.name}.quantizing"
        self.metadata = {"format": "pt", "quantization": kind, "group": str(self.group)}
        self.calibration = calibration
        if calibration is not None:  # parts of a run with another text are not taken up
            self.metadata["calibration"] = calibration.digest
        self.layers = weights.config.n_layers
        self._entries = self._shapes()
        # The numbers of quantizing on load: by the kernels that it would take.
        dense, experts = choose(DENSE_SCHEME), choose(kind, self.group or None)
        assert dense is not None and experts is not None  # the last of each form runs everywhere
        self._dense_kernel = dense
        self._experts_kernel = experts_of(experts, str(weights.config.ffn_config.activation))

    def write(self, finish: Callable[[Path], None], progress: Callable[[int, int], None] | None = None) -> None:
        """Make the folder; it appears under its name when it is whole. `finish` adds the tokenizer's files before.

        `progress` hears how far it is, in bytes of the source's weights: hashing them counts as a part of it.
        `ResourceError` if the disk is too small, `InputError` if another run writes the same folder.
        """
        sizes = [self.weights.nbytes_of(name) for name in expected_tensors(self.weights.config)]
        hashed = sum(path.stat().st_size for path in self._source_files())
        count = _Counter(progress, hashed + sum(sizes), sum(sizes))
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with _alone(self.work):
                self._require_room()
                source = self._hash_source(count)
                self.metadata["source"] = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
                for shard in range(self.layers + 1):
                    self._write_shard(shard, count)
                self._write_json(source)
                finish(self.work)
                os.rename(self.work, self.out)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._require_room()
            raise InputError(f"{self.out} cannot be written: {error.strerror}", "name another place") from None

    def _shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every tensor that will be written."""
        entries = layout(self.weights.config, self.kind, self.group)
        for name, shape in expected_tensors(self.weights.config).items():
            if STACKED not in name and not name.endswith(DENSE):
                entries[name] = "BF16" if self._dtype(name) == torch.bfloat16 else "F32", shape
        return entries

    def _dtype(self, name: str) -> torch.dtype:
        """Of what stays a float: the large embedding in 16 bits, where the source has no more."""
        mostly = self.weights.dtypes().most_common(1)[0][0]
        return torch.bfloat16 if name == EMBEDDING and mostly != "F32" else torch.float32

    def _file(self, shard: int) -> str:
        return f"model-{shard + 1:05}-of-{self.layers + 1:05}.safetensors"

    def _names(self, shard: int) -> list[str]:
        """The tensors of a file, in order: an expert's together."""
        prefix = f"transformer.blocks.{shard}."
        if shard < self.layers:
            return [name for name in self._entries if name.startswith(prefix)]
        return [name for name in self._entries if ".blocks." not in name]

    def _nbytes(self, name: str) -> int:
        dtype, shape = self._entries[name]
        return prod(shape) * BITS[dtype] // 8

    def _require_room(self) -> None:
        done = sum(path.stat().st_size for path in self.work.iterdir())
        needed = sum(map(self._nbytes, self._entries)) + ROOM - done
        free = shutil.disk_usage(self.work).free
        if free < needed:
            raise ResourceError(
                f"{needed / 1e9:.1f} GB are to be written, {self.work.parent} has {free / 1e9:.1f} GB free",
                "make room, or name a place on a larger disk; what is done already is kept",
            )

    def _source_files(self) -> list[Path]:
        extents = (self.weights.expert_extents(layer, 0) for layer in range(self.layers))
        found = {extent.file for expert in extents for extent in expert}
        folder = self.weights.source if self.weights.source.is_dir() else self.weights.source.parent
        return sorted(found | (set(folder.glob("*.safetensors")) if self.weights.source.is_dir() else set()))

    def _hash_source(self, count: _Counter) -> dict[str, str]:
        """sha256 of each file of the source, several at a time."""

        def digest(path: Path) -> str:
            with path.open("rb", buffering=0) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        digests = {}
        files = self._source_files()
        cores = torch.get_num_threads()
        with freed_at_once(), threads(cores) as pool:
            for path, found in zip(files, in_order(pool, cores, digest, files), strict=True):
                digests[path.name] = found
                count.add(path.stat().st_size)
        return digests

    def _write_shard(self, shard: int, count: _Counter) -> None:
        """Write a file unless an earlier run did."""
        path, names = self.work / self._file(shard), self._names(shard)
        if not self._is_done(path, names):
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                _write_header(file, {name: self._entries[name] for name in names}, self.metadata)
                for expected, (name, tensor) in zip(names, self._tensors(shard, names), strict=True):
                    assert expected == name and tensor.nbytes == self._nbytes(name)
                    if not is_finite(tensor):
                        raise not_finite()
                    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(part, path)
        self.weights.give_back()
        prefix = f"transformer.blocks.{shard}."
        count.add(
            sum(
                self.weights.nbytes_of(name)
                for name in expected_tensors(self.weights.config)
                if (name.startswith(prefix) if shard < self.layers else ".blocks." not in name)
            )
        )

    def _is_done(self, path: Path, names: list[str]) -> bool:
        try:
            with opened(path, self.work) as (fd, size):
                header = read_header(fd, size, path)
        except ModelError:
            return False
        return header.metadata == self.metadata and list(header.tensors) == names

    def _tensors(self, shard: int, names: Iterable[str]) -> Tensors:
        """The tensors of a file in their order."""
        experts = self._experts(shard) if shard < self.layers else iter(())
        dense: dict[str, Tensor] = {}
        for name in names:
            if ".ffn.experts." in name:
                found, tensor = next(experts)
                assert found == name
                yield name, tensor
                continue
            whole = name.rpartition(".")[0] + ".weight"
            if not whole.endswith(DENSE):
                yield name, self.weights.read(name, self._dtype(name))
                continue
            if name not in dense:
                matrix = self._dense_kernel.quantize(self.weights.read(whole))
                dense = {
                    f"{whole.removesuffix('weight')}{part}": tensor for part, tensor in _parts(DENSE_SCHEME, matrix)
                }
            yield name, dense[name]
        left = next(experts, None)  # behind the last one a calibration's text goes on to the next layer
        assert left is None

    def _experts(self, layer: int) -> Tensors:
        """The parts of a layer's experts, in order."""
        quantized = self._calibrated(layer) if self.calibration else self._plain(layer)
        for expert, stored in enumerate(quantized):
            for matrix, parts in zip(MATRICES, stored, strict=True):
                for part, tensor in _parts(self.kind, parts):
                    yield f"{EXPERT.format(layer, expert)}{matrix}.{part}", tensor

    def _plain(self, layer: int) -> Iterator[QuantizedExpert]:
        def make(expert: int) -> QuantizedExpert:
            floats = self.weights.expert(layer, expert, read_expert(self.weights, layer, expert))
            return self._experts_kernel.quantize(floats)

        count = at_once(self.weights, available_memory() // 4)
        with freed_at_once(), threads(count) as pool:
            yield from in_order(pool, count + 1, make, range(self.weights.config.ffn_config.moe_num_experts))

    def _calibrated(self, layer: int) -> Iterator[QuantizedExpert]:
        assert self.calibration is not None
        return self.calibration.experts(layer, partial(quantize, self.kind, self.group))

    def _write_json(self, source: dict[str, str]) -> None:
        settings: dict[str, Any] = {"quant_method": METHOD, "version": VERSION, "kind": self.kind}
        if SCHEMES[self.kind].groups:
            settings["group"] = self.group
        config = self.weights.config.to_dict() | {
            "torch_dtype": "float32",
            "quantization_config": settings | {"source": self.weights.source.name, "source_sha256": source},
        }
        shards = {name: self._file(shard) for shard in range(self.layers + 1) for name in self._names(shard)}
        index = {"metadata": {"total_size": sum(map(self._nbytes, self._entries))}, "weight_map": shards}
        for file, content in (("config.json", config), (INDEX_NAME, index)):
            (self.work / file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock of a folder: two runs would write into the same files, and one that ends early leaves holes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of file systems without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{folder} is in use by another run", "wait for it, or name another place") from None
        yield
    finally:
        os.close(handle)


def _parts(kind: str, matrix: QuantizedMatrix) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a stored matrix under the names of its parts."""
    return zip(SCHEMES[kind].parts, (tensor for tensor in matrix if tensor is not None), strict=True)


class _Counter:
    """Adds up for a progress bar: of 1.8 GB of work over weights of 0.9 GB, two bytes of work are one that is shown."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int, shown: int) -> None:
        self._progress, self._total, self._shown, self._done = progress, total, shown, 0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress:
            self._progress(self._done * self._shown // max(1, self._total), self._shown)


def _write_header(file: BinaryIO, entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, (dtype, shape) in entries.items():
        end = start + prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    file.write(len(text).to_bytes(8, "little") + text)
