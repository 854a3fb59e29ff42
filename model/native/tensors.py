"""From tensors to what the native kernels take: addresses, given only after everything that they rely on is checked.

A wrong tensor is a wrong call (`ValueError`). The structs keep the tensors alive that they point to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantization import BLOCKS, GROUP_SIZES, SCHEMES
from .abi import Expert, Format, Matrix, Ranges

AFFINE = {4: Format.INT4, 3: Format.INT3}  # bits, with a scale and a zero point for each group of inputs
RANGES = {
    torch.bfloat16: Ranges.RANGES_BF16,
    torch.float16: Ranges.RANGES_F16,
    torch.float32: Ranges.RANGES_F32,
}
LARGEST = 2**31 - 1  # of a side; with it no product of sizes leaves 64 bits


def address(tensor: Tensor, dtype: torch.dtype, *shape: int, name: str = "a tensor") -> int:
    """Where a tensor's numbers lie: in this memory, row by row, of this type and shape, aligned to their size."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous in the CPU's memory")
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty")
    if tensor.data_ptr() % tensor.element_size():
        raise ValueError(f"{name} lies at no multiple of {tensor.element_size()} bytes")
    return tensor.data_ptr()


def matrix(
    values: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    group: int = 0,
    bits: int = 4,
    transposed: bool = False,
) -> Matrix:
    """A matrix of its parts; which format it has, their types tell, and bits.

    values: float32 or bfloat16 [outputs, inputs] (transposed: [inputs, outputs]);
    or int8 [outputs, inputs] with scale float32 [outputs];
    or uint8 [outputs, inputs * bits / 8] with scale and zero bfloat16 [outputs, ceil(inputs / group)].
    """
    if values.dim() != 2:
        raise ValueError(f"a matrix has two sides, not {values.dim()}")
    outputs, inputs = reversed(values.shape) if transposed else values.shape
    found = Matrix(transposed=transposed, group=group, values=address(values, values.dtype, *values.shape))
    kind = (values.dtype, scale is not None, zero is not None, group > 0)
    if kind == (torch.float32, False, False, False):
        found.format = Format.F32
    elif kind == (torch.bfloat16, False, False, False):
        found.format = Format.BF16
    elif kind == (torch.int8, True, False, False) and scale is not None and not transposed:
        found.format = Format.INT8
        found.scale = address(scale, torch.float32, outputs, name="scale")
    elif kind == (torch.uint8, True, True, True) and scale is not None and zero is not None and not transposed:
        found.format, known = AFFINE[bits], SCHEMES[AFFINE[bits].name.lower()].groups
        inputs, rest = divmod(inputs * 8, bits)
        if rest:
            raise ValueError(f"rows of {values.shape[1]} bytes are no whole inputs of {bits} bits")
        if group not in known:
            raise ValueError(f"no groups of {group} inputs: {', '.join(map(str, known))} are known")
        groups = -(-inputs // group)
        found.scale = address(scale, torch.bfloat16, outputs, groups, name="scale")
        found.zero = address(zero, torch.bfloat16, outputs, groups, name="zero")
    else:
        raise ValueError(f"no format has values of {values.dtype} with these parts")
    if max(outputs, inputs) > LARGEST:
        raise ValueError(f"a matrix of {outputs} x {inputs} is too large")
    found.outputs, found.inputs = outputs, inputs
    found.parts = values, scale, zero
    return found


def block_matrix(values: Tensor, kind: str) -> Matrix:
    """A matrix in ggml's blocks of a kind in `BLOCKS`: values uint8 [outputs, bytes of a row]."""
    outputs, nbytes = values.shape
    blocks, rest = divmod(nbytes, BLOCKS[kind].nbytes)
    if rest:
        raise ValueError(f"rows of {nbytes} bytes are no whole blocks of {kind}")
    inputs = blocks * BLOCKS[kind].inputs
    if max(outputs, inputs) > LARGEST:
        raise ValueError(f"a matrix of {outputs} x {inputs} is too large")
    at = address(values, torch.uint8, outputs, nbytes)
    found = Matrix(format=Format[kind], outputs=outputs, inputs=inputs, values=at)
    found.parts = (values,)
    return found


def group_matrix(values: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int, zero_points: bool) -> Matrix:
    """A matrix of the parts of a `GroupMatrix`."""
    outputs, nbytes = values.shape
    inputs, rest = divmod(nbytes * 8, bits)
    if rest or group not in GROUP_SIZES or scale.dtype not in RANGES:
        raise ValueError(
            f"rows of {nbytes} bytes, {bits} bits a weight, groups of {group}, {scale.dtype}: no such format"
        )
    if max(outputs, inputs) > LARGEST:
        raise ValueError(f"a matrix of {outputs} x {inputs} is too large")
    shape = outputs, -(-inputs // group)
    found = Matrix(
        format=Format[f"GROUPS_{bits}"],
        group=group,
        ranges=RANGES[scale.dtype] | (Ranges.ZERO_POINTS if zero_points else 0),
        outputs=outputs,
        inputs=inputs,
        values=address(values, torch.uint8, outputs, nbytes),
        scale=address(scale, scale.dtype, *shape, name="scale"),
        zero=address(offset, scale.dtype, *shape, name="offset"),
    )
    found.parts = values, scale, offset
    return found


class Experts:
    """A layer's experts: an array for the library, `array`, and the matrices it points to.

    each: w1 and v1 [h, d], w2 [d, h]; or (), of an expert that lies elsewhere. `runs`: from which to which there are
    some; of six of which 0, 3 and 4 are here, [(0, 1), (3, 5)].
    """

    def __init__(self, each: Sequence[tuple[Matrix, Matrix, Matrix] | tuple[()]]) -> None:
        self.matrices = tuple(parts for parts in each if parts)
        if not self.matrices:
            raise ValueError("no experts")
        is_here = [False, *map(bool, each), False]
        edges = [i for i in range(len(each) + 1) if is_here[i] != is_here[i + 1]]
        self.runs = list(zip(edges[::2], edges[1::2], strict=True))
        h, d = self.matrices[0][0].outputs, self.matrices[0][0].inputs
        for parts in self.matrices:
            sides = [(part.outputs, part.inputs) for part in parts]
            if sides != [(h, d), (h, d), (d, h)]:
                raise ValueError(f"matrices of {sides} are no expert of {d} x {h}")
        self.array = (Expert * len(each))(*(Expert(*parts) for parts in each))

    def __len__(self) -> int:
        return len(self.array)
