"""Calls of compiled functions through their C interface, which lets Python's lock go.

What PyTorch has for it (`AOTIModelPackageLoader.run`) holds the lock: functions on several threads would wait for each
other.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


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
        count, convert = ctypes.c_size_t, torch._C._aoti
        given = [_pointer(tensor, None) for tensor in convert.unsafe_alloc_void_ptrs_from_tensors(list(arguments))]
        pointers, found = (ctypes.c_void_p * len(given))(*given), (ctypes.c_void_p * self._outputs)()
        if self._run(self._container, pointers, count(len(given)), found, count(len(found)), None, None):
            raise RuntimeError(f"{self._path}: a compiled function failed")  # it said why on stderr
        # One that returns nothing has a null pointer.
        return convert.alloc_tensors_by_stealing_from_void_ptrs([_capsule(p, None, None) for p in found if p])
