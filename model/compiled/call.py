"""Calls of compiled functions through their C interface, which lets Python's lock go.

What PyTorch has for it (`AOTIModelPackageLoader.run`) holds the lock: functions on several threads would wait for each
other.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..handles import handles, tensors


class CompiledFunction:
    """A function in a shared library, as PyTorch's compiler makes one. `OSError` or `AttributeError` if it is none.

    Shapes and types have to be those that it was compiled for: nobody checks.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._path = path
        self._run = library.AOTInductorModelContainerRun
        self._container = ctypes.c_void_p()
        # So many threads can be in it at the same time; one more waits.
        created = library.AOTInductorModelContainerCreateWithDevice(
            ctypes.byref(self._container), ctypes.c_size_t(os.cpu_count() or 1), b"cpu", None
        )
        outputs = ctypes.c_size_t()
        if created or library.AOTInductorModelContainerGetNumOutputs(self._container, ctypes.byref(outputs)):
            raise OSError("the library makes no function")
        self._outputs = outputs.value

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """arguments: what all of them hold, one tensor after the other."""
        count, given = ctypes.c_size_t, handles(arguments)
        pointers, found = (ctypes.c_void_p * len(given))(*given), (ctypes.c_void_p * self._outputs)()
        if self._run(self._container, pointers, count(len(given)), found, count(len(found)), None, None):
            raise RuntimeError(f"{self._path}: a compiled function failed")  # it said why on stderr
        return tensors(handle for handle in found if handle)  # what returns nothing leaves one without a value
