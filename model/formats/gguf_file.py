"""The header of a GGUF file, treated as hostile: every count, length, type and offset is checked before it is used.

The gguf package's own reader trusts the file, and takes seconds for a vocabulary; its tables of types are used.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import re
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ModelError
from ..safetensors_file import TensorInfo, belongs, damaged, disguised, how_to_get, map_file, opened, pread, shown

MAX_HEADER = 32 * 2**20  # DBRX's has 5 MB, nearly all of it tokens and merges
MAX_PAIRS = 1_000
MAX_ITEMS = 1_000_000  # of all arrays together
MAX_TENSORS = 50_000
MAX_NAME = 256
MAX_DIMENSIONS = 4
MAX_PARTS = 1_000
RAW_PIECE = re.compile(r"(.+\.gguf)\.part\d+of\d+")  # cut with `split`, before llama.cpp could split files itself
PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_TYPE = 1_000  # numbers of ggml's types are below; relatives of llama.cpp begin theirs in the hundreds
IMPORTANCE_MATRIX = (
    "is an importance matrix, not a model",
    "it serves to quantize: `dbrx quantize MODEL OUT --calibrate FILE`, or give the quantized model with -m",
)
OTHER_TYPE = "take the model in another quantization, such as Q4_K_M or Q8_0"


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A model in one file or several: values by key, tensors by name, and the files, mapped privately.

    A tensor's `dtype` is ggml's name for its type ("Q4_0"), its shape has rows first, as in torch.
    """

    path: Path  # the only file, or the first part
    values: dict[str, Any]
    tensors: dict[str, TensorInfo]
    maps: dict[Path, mmap.mmap]

    def fault(self, why: str, hint: str | None = None) -> ModelError:
        """A fault of this model."""
        return ModelError(f"{self.path}: {why}", hint)

    def value(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the header; `ModelError` if it is of another kind, or absent without a default."""
        found = self.values.get(key, default)
        if found is None:
            raise self.fault(f"says no {key}", "take another conversion of the model")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            raise self.fault(f"{key} is {shown(repr(found))}, not {' or '.join(k.__name__ for k in kinds)}")
        return found


def open_gguf(path: Path) -> GgufFile:
    """Open a model by its file, or by any part of a split one; headers are checked, no tensor is read.

    `ModelError` names the file that is missing, damaged or lies.
    """
    paths = _parts(path)
    parts = [_open(part) for part in paths]
    first, total = parts[0], len(parts)
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        count, index = part.value("split.count", int, 1), part.value("split.no", int, number)
        if (count or 1) != total:
            raise part.fault(
                f"is part {index + 1} of {count}, which its name does not say",
                "give the parts their names back: NAME-00001-of-00003.gguf and so on",
            )
        if index != number:
            raise part.fault(f"is part {index + 1}, not {number + 1} as its name says")
        for name in part.tensors:
            if name in tensors:
                raise part.fault(f"tensor {shown(name)} is also in {tensors[name].file.name}")
        tensors |= part.tensors
    promised = first.value("split.tensors.count", int, len(tensors))
    if promised != len(tensors):
        raise first.fault(f"promises {promised} tensors, the files hold {len(tensors)}", how_to_get(path.parent))
    return GgufFile(first.path, first.values, tensors, {part.path: part.maps[part.path] for part in parts})


def _parts(path: Path) -> list[Path]:
    """All files of a model, by the name of one."""
    if piece := RAW_PIECE.fullmatch(path.name):
        name = shlex.quote(piece[1])
        raise ModelError(
            f"{path}: is a piece of a file that was cut",
            f"join them: cat {name}.part*of* > {name}",
        )
    found = PART_NAME.fullmatch(path.name)
    if found is None:
        # A link that the user names is followed, wherever it leads; those of a cache keep their names.
        real = Path(os.path.realpath(path))
        return [path if belongs(real, Path(os.path.realpath(path.parent))) else real]
    stem, number, count = found[1], int(found[2]), int(found[3])
    if not 1 <= number <= count <= MAX_PARTS:
        raise ModelError(f"{path}: there cannot be a part {number} of {count}")
    paths = [path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [each for each in paths if not os.path.exists(each)]
    if missing:
        rest = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        gone = f"part {paths.index(missing[0]) + 1} of {count} is missing{rest}"
        raise ModelError(f"{missing[0]}: {gone}", how_to_get(path.parent))
    return paths


def _open(path: Path) -> GgufFile:
    with opened(path, path.parent) as (fd, size):
        head = pread(fd, 24, 0)
        if not head.startswith(b"GGUF"):
            raise _importance_matrix(path, head) or disguised(path, head) or damaged(path, "is not a GGUF file")
        if len(head) < 24:
            raise damaged(path, "is too short for a GGUF file")
        mapped = map_file(fd, size)
    header = _Header(path, mapped, size)
    values = header.pairs()
    tensors = header.tensors(values.get("general.alignment", 32))
    return GgufFile(path, values, tensors, {path: mapped})


def _importance_matrix(path: Path, head: bytes) -> ModelError | None:
    if is_older_importance_matrix(head):
        return ModelError(f"{path}: {IMPORTANCE_MATRIX[0]}", IMPORTANCE_MATRIX[1])
    return None


def is_older_importance_matrix(head: bytes) -> bool:
    """Whether a file begins so: a number of entries, and of the first the length of its name and the name."""
    return len(head) == 24 and head[8:].startswith((b"blk.", b"output", b"token_embd")) and head[5:8] == bytes(3)


class _Header:
    """A cursor that never reads beyond the file or `MAX_HEADER`."""

    def __init__(self, path: Path, mapped: mmap.mmap, size: int) -> None:
        self.path, self.mapped, self.size = path, mapped, size
        self.position, self.items = 24, 0
        version, self.n_tensors, self.n_pairs = struct.unpack_from("<IQQ", mapped, 4)
        if version not in (2, 3):
            big_endian = version in (2 << 24, 3 << 24)
            what = "is for big-endian machines" if big_endian else f"has GGUF version {version}; 2 and 3 can be read"
            raise ModelError(f"{path}: {what}", "take another conversion of the model")
        if self.n_pairs > MAX_PAIRS or self.n_tensors > MAX_TENSORS:
            self.refuse(f"claims {self.n_pairs} values and {self.n_tensors} tensors, more than any DBRX model has")

    def refuse(self, why: str) -> NoReturn:
        raise damaged(self.path, why)

    def pairs(self) -> dict[str, Any]:
        """Keys and values."""
        values: dict[str, Any] = {}
        for _ in range(self.n_pairs):
            key = self.string(MAX_NAME)
            if key in values:
                self.refuse(f"holds {shown(key)} twice")
            values[key] = self.value(self.number("I"))
        return values

    def tensors(self, alignment: Any) -> dict[str, TensorInfo]:
        """The tensors with their places; they follow each other without holes, as in every file of llama.cpp."""
        if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
            self.refuse(f"general.alignment is {shown(repr(alignment))}, not a power of two from 8 to 65536")
        entries = [self.tensor() for _ in range(self.n_tensors)]
        start = _aligned(self.position, alignment)
        found: dict[str, TensorInfo] = {}
        position = 0
        for name, kind, shape, nbytes, offset in sorted(entries, key=lambda entry: entry[-1]):
            if name in found:
                self.refuse(f"holds tensor {shown(name)} twice")
            if offset != position:
                what = "overlaps the one before" if offset < position else "leaves a hole before it"
                self.refuse(f"tensor {shown(name)} {what}")
            if start + offset + nbytes > self.size:
                self.refuse(f"is truncated: tensor {shown(name)} ends at {start + offset + nbytes}, it at {self.size}")
            found[name] = TensorInfo(name, self.path, kind, shape, start + offset, nbytes)
            position = _aligned(offset + nbytes, alignment)
        if found and self.size > start + position:
            self.refuse(f"has {self.size} bytes, but its header describes {start + position}")
        return found

    def tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, bytes, and offset in the data."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, n_dimensions = self.string(MAX_NAME), self.number("I")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            self.refuse(f"tensor {shown(name)} has {n_dimensions} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(n_dimensions)]))
        number, offset = self.number("I"), self.number("Q")
        try:
            kind = GGMLQuantizationType(number)
            block, nbytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            why = f"tensor {shown(name)} has the unknown type {number}"
            if number >= MAX_TYPE:
                self.refuse(why)
            raise ModelError(f"{self.path}: {why}, of a newer llama.cpp or of a relative", OTHER_TYPE) from None
        elements = math.prod(shape)
        if not 0 < elements < 2**60 or max(shape) >= 2**60:
            self.refuse(f"tensor {shown(name)} has the impossible shape {list(shape)}")
        if shape[-1] % block:
            self.refuse(f"tensor {shown(name)} has rows of {shape[-1]}, which {kind.name} cannot have")
        return name, kind.name, shape, elements // block * nbytes, offset

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string(MAX_HEADER)
        if kind != ARRAY:
            self.refuse(f"holds a value of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        self.items += count
        if self.items > MAX_ITEMS:
            self.refuse(f"has arrays of more than {MAX_ITEMS} items")
        if kind == STRING:
            return [self.string(MAX_HEADER) for _ in range(count)]
        if kind not in SCALARS:
            self.refuse(f"holds an array of the type {kind}, which is not supported")
        layout = f"<{count}{SCALARS[kind]}"
        return list(struct.unpack_from(layout, self.mapped, self.advance(struct.calcsize(layout))))

    def number(self, code: str) -> Any:
        layout = "<" + code
        return struct.unpack_from(layout, self.mapped, self.advance(struct.calcsize(layout)))[0]

    def string(self, limit: int) -> str:
        length = self.number("Q")
        if length > limit:
            self.refuse(f"holds a text of {length} bytes, more than the {limit} that belong there")
        start = self.advance(length)
        try:
            return self.mapped[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"holds text that is not UTF-8, at byte {start}")

    def advance(self, count: int) -> int:
        """Where the next `count` bytes begin; they are inside the file and the header's limit."""
        start = self.position
        self.position += count
        if self.position > self.size:
            self.refuse(f"is truncated: its header ends behind byte {self.position}, it at {self.size}")
        if self.position > MAX_HEADER:
            self.refuse(f"has a header of more than {MAX_HEADER} bytes, which no DBRX model needs")
        return start


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
