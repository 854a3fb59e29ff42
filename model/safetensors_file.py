"""One file of a checkpoint, treated as hostile: nothing outside the folder is opened, nothing blocks, and every number
of a safetensors header is checked before it is used.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .errors import ModelError
from .json_text import CONFIG, Limits, parse_file

# safetensors itself allows 100 MB, which Python's JSON parser turns into gigabytes. DBRX's own headers have a few KB,
# those of a layout with every expert's matrices in four pieces about 1 MB; 13 entries a tensor.
HEADER = Limits(4 * 2**20, 750_000)
MAX_TEXT = 2**20  # a template, a list of files: the largest known have some 20 KB
MAX_NAME = 256
MAX_DIMENSIONS = 8

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` is the absolute byte offset in `file`, `dtype` safetensors' name ("BF16")."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@contextmanager
def opened(path: Path, folder: Path) -> Iterator[tuple[int, int]]:
    """File descriptor and size of a regular file of the checkpoint; anything else is refused, unopened."""
    fd = -1
    try:
        real = Path(os.path.realpath(path, strict=True))
        if not belongs(real, Path(os.path.realpath(folder))):
            raise ModelError(
                f"{path}: links to a place outside the folder, which is not followed",
                "give the folder that holds the files themselves, or copy them",
            )
        _require_regular(os.stat(real), path)
        fd = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # NONBLOCK: a FIFO put there since the stat
        status = os.fstat(fd)
        _require_regular(status, path)
        yield fd, status.st_size
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        if fd >= 0:
            os.close(fd)


def read_text(path: Path) -> str:
    """A text file of a checkpoint (a template, a ref), bounded and never from outside the folder."""
    content = read_bytes(path, MAX_TEXT)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"is not UTF-8: {error.reason} at byte {error.start}") from None


def read_json(path: Path, limits: Limits = CONFIG) -> dict[str, Any]:
    """A JSON object (configuration, tokenizer) from such a file, within its kind's limits."""
    try:
        values = parse_file(read_bytes(path, limits.nbytes), limits)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return values


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file of at most so many bytes, never from outside its folder."""
    with opened(path, path.parent) as (fd, size):
        if size > most:
            raise ModelError(f"{path}: has {size} bytes, more than any such file needs")
        return pread(fd, size, 0)


def _require_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path}: is not a regular file")


def belongs(real: Path, folder: Path) -> bool:
    """Whether a resolved file is part of the folder, or of the Hub cache's storage for that snapshot."""
    if real.is_relative_to(folder):
        return True
    repo = _hub_repo(folder)
    # Blobs of one model lie in its own folder; newer versions of huggingface_hub share them in <cache>/blobs/<2 hex>/.
    return repo is not None and (real.parent == repo / "blobs" or real.parent.parent == repo.parent / "blobs")


def _hub_repo(folder: Path) -> Path | None:
    """`<cache>/models--org--name` of a resolved `<cache>/models--org--name/snapshots/<commit>`."""
    repo = folder.parent.parent
    return repo if folder.parent.name == "snapshots" and repo.name.startswith("models--") else None


def pread(fd: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes: fewer only at the end of the file."""
    parts = []
    while count > 0 and (part := os.pread(fd, count, offset)):
        parts.append(part)
        count, offset = count - len(part), offset + len(part)
    return b"".join(parts)


def map_file(fd: int, size: int) -> mmap.mmap:
    """A private, writable map of a whole file: torch may write to it, the file never changes.

    NORESERVE, because Linux refuses a private map larger than memory otherwise; Python 3.11 and 3.12 do not name it.
    """
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE | no_reserve, prot=protection)
    except ValueError as error:  # the file shrank since its size was read
        raise OSError(0, str(error)) from None


def give_back(mapped: mmap.mmap) -> None:
    """Let the system have the pages of a map that were read; what was written to them is lost."""
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


class Header(NamedTuple):
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(fd: int, size: int, path: Path) -> Header:
    """The header: its length in 8 bytes, JSON; the data follows without holes to the end of the file."""
    head = pread(fd, 64, 0)
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > HEADER.nbytes:
        raise disguised(path, head) or damaged(path, "is not a safetensors file")
    if 8 + length > size:
        raise damaged(path, f"is truncated: its header ends at byte {8 + length}, the file at {size}")
    content = pread(fd, length, 8)
    if not content.startswith(b"{"):
        raise damaged(path, "is not a safetensors file: its header does not begin with '{'")
    entries = parse_json(content, path, "header ")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null is what mlx writes for none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: header __metadata__ must map text to text")
    infos = [_tensor_info(name, entry, path, 8 + length) for name, entry in entries.items()]
    if not infos:
        raise ModelError(f"{path}: holds no tensors")
    _check_ranges(infos, 8 + length, size, path)
    return Header({info.name: info for info in infos}, metadata)


def _tensor_info(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    def refuse(why: str) -> NoReturn:
        raise damaged(path, f"header entry {shown(name)} {why}")

    if len(name) > MAX_NAME:
        refuse("has too long a name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse("must hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        refuse(f"has the unknown type {shown(str(dtype))}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(n) for n in shape):
        refuse(f"must have a shape of at most {MAX_DIMENSIONS} sizes")
    if math.prod(n or 1 for n in shape) * BITS[dtype] >= 2**63:
        refuse("is too large")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        refuse("must have two data_offsets")
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * BITS[dtype]:
        refuse(f"has {end - start} bytes, but its type and shape need {math.prod(shape) * BITS[dtype] / 8:g}")
    return TensorInfo(name, path, dtype, tuple(shape), data_start + start, end - start)


def _check_ranges(infos: list[TensorInfo], data_start: int, size: int, path: Path) -> None:
    position = data_start
    for info in sorted(infos, key=lambda info: (info.start, info.nbytes)):
        if info.start != position:
            what = "overlaps the one before" if info.start < position else "leaves a hole before it"
            raise damaged(path, f"header entry {shown(info.name)} {what}")
        position += info.nbytes
    if size < position:
        raise damaged(path, f"is truncated: {size} of {position} bytes")
    if size > position:
        raise damaged(path, f"has {size} bytes, but its header describes {position}")


def parse_json(content: bytes, path: Path, part: str) -> dict[str, Any]:
    """A JSON object with the names of tensors: a header, or an index."""
    try:
        parsed = parse_file(content, HEADER)
    except ValueError as error:
        raise disguised(path, content) or damaged(path, f"{part}{error}") from None
    if not isinstance(parsed, dict):
        raise damaged(path, f"{part}is not a JSON object")
    return parsed


def disguised(path: Path, head: bytes) -> ModelError | None:
    """What a file that should hold weights or JSON really is, by its first bytes."""
    if head.startswith(b"version https://git-lfs"):
        return ModelError(f"{path}: is a Git LFS pointer, not the file itself", "run `git lfs pull` in the folder")
    if head.startswith(b"GGUF"):
        return ModelError(f"{path}: is a GGUF file", "give it the ending .gguf, and give the file itself with -m")
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return ModelError(f"{path}: is a pickle file, which can run code: not loaded", "convert it to safetensors")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return damaged(path, "is a web page, not the file itself")
    return None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def damaged(path: Path, why: str) -> ModelError:
    """A file of the checkpoint that must be fetched again."""
    return ModelError(f"{path}: {why}", how_to_get(path.parent))


def how_to_get(folder: Path) -> str:
    """What to type to get a file again; a snapshot of the Hub's cache knows its own id."""
    repo = _hub_repo(Path(os.path.realpath(folder)))
    if repo is not None:
        return f"fetch it again: dbrx download {repo.name.removeprefix('models--').replace('--', '/', 1)}"
    return f"copy the files again, or: dbrx download MODEL --to {folder}"


def shown(text: str) -> str:
    """Text of a hostile file on one short line: no control or invisible characters."""
    line = text if text.isprintable() else ascii(text)
    return line if len(line) <= 120 else f"{line[:100]}... ({len(line)} characters)"
