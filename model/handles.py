"""Tensors as PyTorch's C interface knows them: addresses of handles, which belong to whoever is given them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def handles(tensors: Sequence[Tensor]) -> list[int]:
    """New ones."""
    return [_pointer(capsule, None) for capsule in torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))]


def tensors(handles: Iterable[int]) -> list[Tensor]:
    """What they stand for; they are gone after it."""
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(handle, None, None) for handle in handles])
