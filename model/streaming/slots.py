"""Memory for one expert's bytes, made once and used again and again."""

from __future__ import annotations

import mmap
import os
import threading
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import ResourceError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096  # what direct reads align to, in the file and in memory
STAGING = 4 * 2**20  # bytes that travel through pinned memory at a time


class Slot(Protocol):
    """Bytes on the device that computes."""

    tensor: Tensor  # uint8 [nbytes]

    def read(self, fd: int, start: int, at: int, count: int) -> int:
        """Bring bytes of a file to offset `at`; fewer than `count` only at the file's end. Called by reader threads."""

    def release(self) -> None:
        """All that computes with these bytes was begun: they may be overwritten when it is done."""


class CpuSlot:
    """In the CPU's memory, aligned to pages. The system gives a page when it is first written to.

    In huge pages, where there are: a disk writes to a few long runs of memory twice as fast as to thousands of single
    pages, and they are given back at once. Only private memory gets them; shared is what `mmap` would take.
    """

    def __init__(self, nbytes: int, pinned: bool = False) -> None:
        try:
            self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _no_room(nbytes) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(self._map)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self._pinned = pinned
        if pinned:
            _pin(self.tensor)

    def read(self, fd: int, start: int, at: int, count: int) -> int:
        return os.preadv(fd, [self._memory[at : at + count]], start)

    def release(self) -> None:
        """Nothing to do: a CPU has computed when the call returns."""

    def unpin(self) -> None:
        """Before its memory is given back: no copy of a GPU's is under way."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())  # type: ignore[no-untyped-call]
            self._pinned = False


class GpuSlot:
    """In a GPU's memory. Files come through pinned memory, a piece for each reader thread, on its own stream."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        try:
            self.tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise _no_room(nbytes) from error
        self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def read(self, fd: int, start: int, at: int, count: int) -> int:
        if not hasattr(_thread, "staging"):
            _thread.staging = CpuSlot(STAGING, pinned=True)
            _thread.stream = torch.cuda.Stream(self.tensor.device)  # type: ignore[no-untyped-call]
        got: int = _thread.staging.read(fd, start, 0, count)
        self.copy(_thread.staging.tensor[:got], at, _thread.stream)
        _thread.stream.synchronize()  # the staging memory is needed again
        return got

    def copy(self, source: Tensor, at: int, stream: torch.cuda.Stream) -> None:
        """Begin to bring pinned bytes to offset `at`, behind the last use of what lies there."""
        with torch.cuda.stream(stream):
            stream.wait_event(self._used)
            self.tensor[at : at + len(source)].copy_(source, non_blocking=True)

    def release(self) -> None:
        self._used.record(torch.cuda.current_stream(self.tensor.device))


_thread = threading.local()  # of each reader: pinned memory and a stream


def make_slots(count: int, nbytes: int, device: torch.device) -> list[Slot]:
    """Slots on the device that computes."""
    return [CpuSlot(nbytes) if device.type == "cpu" else GpuSlot(nbytes, device) for _ in range(count)]


def _pin(tensor: Tensor) -> None:
    """Fix memory in place, so that a GPU reads it itself. PyTorch's own pinned memory comes in powers of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(code):
        raise ResourceError(
            f"{tensor.nbytes / 1e9:.2f} GB of memory cannot be pinned for the GPU (CUDA error {int(code)})",
            "raise the limit (ulimit -l), or try --offload disk",
        )


def _no_room(nbytes: int) -> ResourceError:
    return ResourceError(
        f"no memory for an expert of {nbytes / 1e9:.2f} GB", "give a smaller --expert-cache, or free memory"
    )
