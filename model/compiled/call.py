"""How compiled functions are called: `alone`, or `beside` others on threads of their own."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..handles import handles, tensors

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # what the arguments hold, one tensor after the other


def alone(path: Path) -> Function:
    """PyTorch's own call, which keeps Python's lock: functions on several threads would wait for each other."""
    return cast("Function", torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1).run)


def beside(path: Path) -> Function:
    """Through the library's C interface, which lets the lock go. A call takes 13 µs instead of 3."""
    library, container, number = ctypes.CDLL(str(path)), ctypes.c_void_p(), ctypes.c_size_t
    at_once = number(os.cpu_count() or 1)  # threads in the function; one more waits
    outputs = number()
    if library.AOTInductorModelContainerCreateWithDevice(
        ctypes.byref(container), at_once, b"cpu", None
    ) or library.AOTInductorModelContainerGetNumOutputs(container, ctypes.byref(outputs)):
        raise OSError("the library makes no function")

    def call(arguments: Sequence[Tensor]) -> list[Tensor]:
        given = handles(arguments)
        pointers, found = (ctypes.c_void_p * len(given))(*given), (ctypes.c_void_p * outputs.value)()
        size = number(len(given))
        if library.AOTInductorModelContainerRun(container, pointers, size, found, outputs, None, None):
            raise RuntimeError(f"{path}: a compiled function failed")  # it said why on stderr
        return tensors(handle for handle in found if handle)  # what returns nothing leaves one without a value

    return call
