"""bfloat16 in the order that oneDNN wants for many rows, and would else bring it to for each product.

Compiled loops read the same memory, an output of sixteen to a lane.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..handles import tensors
from .floats import Floats, multiply
from .kernel import Packed, RowByRow, Rows
from .widened import multiplies_bfloat16

OUTPUTS, INPUTS = 64, 32  # of a block


class FloatBlocks(Floats, RowByRow):
    """(words [outputs / 64, inputs / 32, 16, 64],) for each matrix: two neighbouring inputs of an output.

    A word is float32 by name only. oneDNN takes the same memory through `as_onednn`.
    """

    way = "blocks"

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)

    def pack(self, *weights: Tensor) -> Packed:
        return tuple(_words(weight.to(self.dtype)) for weight in weights)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        return torch.cat([multiply(x[0], as_onednn(words)) for words in packed], dim=1)


def fit(*shapes: tuple[int, int]) -> bool:
    """Whether oneDNN orders bfloat16 matrices [outputs, inputs] like that here."""
    return multiplies_bfloat16() and all(_description(*shape) for shape in shapes)


def as_onednn(words: Tensor) -> Tensor:
    """A matrix [outputs, inputs] in the memory of its words, which is to be kept."""
    outputs, inputs = words.shape[0] * OUTPUTS, words.shape[1] * INPUTS
    description = _description(outputs, inputs)
    assert description
    library, handle, number, long = _library(), ctypes.c_void_p(), ctypes.c_int32, ctypes.c_int64
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(words.data_ptr()),
        long(2),
        (long * 2)(outputs, inputs),
        (long * 2)(inputs, 1),
        long(0),
        number(library.aoti_torch_dtype_bfloat16()),
        number(library.aoti_torch_device_type_cpu()),
        number(0),
        ctypes.byref(handle),
        number(library.aoti_torch_layout__mkldnn()),
        description,
        long(len(description)),
    )
    assert not failed and handle.value
    return tensors([handle.value])[0]


def _words(weight: Tensor) -> Tensor:
    """[outputs, inputs] of 16 bits -> [outputs / 64, inputs / 32, 16, 64], float32 by name."""
    blocks = weight.view(len(weight) // OUTPUTS, OUTPUTS, -1, INPUTS // 2, 2).permute(0, 2, 3, 1, 4)
    return blocks.contiguous().view(torch.float32)[..., 0]


@cache
def _description(outputs: int, inputs: int) -> bytes:
    """oneDNN's own of such a matrix; empty if it has another order, which is seen on one of random bits."""
    if outputs % OUTPUTS or inputs % INPUTS:
        return b""
    bits = torch.randint(2**12, 2**14, (outputs, inputs), dtype=torch.int16)  # none is a special number
    onednn = torch.ops.mkldnn
    try:
        ordered = onednn._reorder_linear_weight(bits.view(torch.bfloat16), outputs)
        size = onednn._nbytes(ordered)
        memory = (ctypes.c_byte * size).from_address(onednn.data_ptr(ordered))
        same = torch.equal(torch.frombuffer(memory, dtype=torch.int16), _words(bits).view(torch.int16).flatten())
        return bytes(onednn._get_mkldnn_serialized_md(ordered).tolist()) if same else b""
    except (AttributeError, RuntimeError):  # another version of PyTorch
        return b""


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
