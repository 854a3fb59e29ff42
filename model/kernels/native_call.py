"""Calls into the native library: its threads are one pool a process, for all networks."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from itertools import accumulate
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..native.abi import Activation, Matrix
from ..native.tensors import matrix
from ..quantization import SCHEMES, not_finite
from ..weights import QuantizedMatrix

ACTIVATIONS = {activation.name.lower(): int(activation) for activation in Activation}
FLOATS = (torch.float32, torch.bfloat16)
TYPES = {"I8": torch.int8, "U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}
LINE = 64  # bytes of a cache line
PIECE = 2**26  # bytes of memory that are asked of the system at once
CALL = 2**34  # multiplications and additions of a call: some tenths of a second at most, for Ctrl-C

_lock = Lock()  # a pool serves one call at a time
_threads = 0


def _after_fork() -> None:
    """Another thread of the parent may have held the lock."""
    global _lock
    _lock = Lock()


os.register_at_fork(after_in_child=_after_fork)


def set_threads() -> None:
    """Compute with as many threads as PyTorch is set to, here and now: its workers may be set to fewer."""
    global _threads
    _threads = torch.get_num_threads()


def function(name: str) -> Callable[..., None]:
    """One of the library's, called without its pool; other threads of Python go on meanwhile.

    `NotImplementedError` where there is no library.
    """
    library = native.library()
    if library is None:
        raise NotImplementedError(native.why_not())
    call = getattr(library, name)
    if not _threads:
        set_threads()

    def run(*arguments: Any) -> None:
        with _lock:
            call(native.pool(_threads).handle, *arguments)

    return run


def float_matrix(weight: Tensor) -> Matrix:
    """A matrix [outputs, inputs] of float32 or bfloat16 as it lies, row by row or column by column."""
    if not weight.is_contiguous() and weight.t().is_contiguous():
        return matrix(weight.t(), transposed=True)
    return matrix(weight.contiguous())


def quantized_matrix(scheme: str, group: int, stored: QuantizedMatrix) -> Matrix:
    """A matrix in few bits as it is stored."""
    parts = (None if part is None else part.contiguous() for part in stored)
    form = SCHEMES[scheme]
    return matrix(*parts, bits=form.bits, group=group if form.groups else 0)  # type: ignore[arg-type]  # the first is there


class _Memory:
    """Parts of large pieces of memory, in the order in which they are asked for; a piece goes with its last tensor.

    Linux gives huge pages to large pieces only: the experts of a layer of `mini` in int8 take 0.70 instead of 0.88 ms.
    """

    def __init__(self) -> None:
        self._piece: Callable[[], mmap.mmap | None] = lambda: None
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """Bytes [nbytes] that nobody has written to, at the beginning of a cache line."""
        with _lock:
            piece = self._piece()
            if piece is None or self._used + nbytes > len(piece):
                piece = self._ask(max(nbytes, PIECE))
                self._piece, self._used = weakref.ref(piece), 0
            start = self._used
            self._used += -(-nbytes // LINE) * LINE
            return torch.frombuffer(piece, dtype=torch.uint8, offset=start, count=nbytes)

    @staticmethod
    def _ask(nbytes: int) -> mmap.mmap:
        try:
            piece = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared has no huge pages
        except OSError as error:
            raise MemoryError(f"no memory for {nbytes / 1e9:.2f} GB of weights") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            piece.madvise(mmap.MADV_HUGEPAGE)
        return piece


_memory = _Memory()


def room(scheme: str, group: int, *shapes: tuple[int, ...]) -> list[QuantizedMatrix]:
    """Matrices [outputs, inputs] in few bits that are not written yet."""
    form = SCHEMES[scheme]
    tensors = [
        (form.shapes(group, *shape)[part], TYPES[dtype]) for shape in shapes for part, dtype in form.parts.items()
    ]
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in tensors]
    starts = [0, *accumulate(-(-size // LINE) * LINE for size in sizes)]
    piece = _memory.take(starts[-1])
    cut = [
        piece[start : start + size].view(dtype).view(shape)
        for start, size, (shape, dtype) in zip(starts, sizes, tensors, strict=False)
    ]
    each = len(form.parts)
    return [QuantizedMatrix(*cut[at : at + each]) for at in range(0, len(cut), each)]


def quantize(
    scheme: str,
    group: int,
    weight: Tensor,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    made: QuantizedMatrix | None = None,
) -> QuantizedMatrix:
    """Floats [outputs, inputs] as they are stored in few bits; written to `made`, if it is given.

    row_scale [outputs] and column_scale [inputs] multiply them before.
    """
    source = float_matrix(weight if weight.dtype in FLOATS else weight.float())
    made = made or room(scheme, group, tuple(weight.shape))[0]
    scales = [None if scale is None else scale.float().contiguous() for scale in (row_scale, column_scale)]
    pointers = (None if scale is None else scale.data_ptr() for scale in scales)
    try:
        function("dbrx_quantize")(source, *pointers, quantized_matrix(scheme, group, made))
    except ValueError as error:
        if "not finite" in str(error):
            raise not_finite() from None
        raise
    return made
