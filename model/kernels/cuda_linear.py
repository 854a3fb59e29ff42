"""Matrices on a card, in int4, int8 and bfloat16: times one to eight tokens by a kernel in Triton, more by cuBLAS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear, pad

from ..quantization import SCHEMES, int4, int8
from ..weights import QuantizedMatrix
from .base import Packed, RowByRow, Rows, check_scales
from .cuda_tiles import CHUNK, FUSED, add_products

GEMV_MAX_TOKENS = 8
PIECE = 2**24  # weights that are dequantized at once: 32 MB of bfloat16, which stay in the second cache
BITS = {"int4": 4, "int8": 8, "bfloat16": 16}


class CudaMatrix(NamedTuple):
    """A matrix as `cuda_tiles` reads it. A row's chunks are a constant of the kernels: they are compiled for it."""

    values: Tensor  # int32 words [outputs, 4 * chunks]
    ranges: Tensor  # int4: int32 [outputs, groups]; int8: float32 [outputs, 1]; bfloat16: float32 [1, 1], not read
    inputs: int

    @property
    def outputs(self) -> int:
        return len(self.values)

    @property
    def chunks(self) -> int:
        return self.values.shape[1] // 4


class Tile(NamedTuple):
    """What a program makes at once: outputs, chunks of each; its warps, and how many registers a thread may have.

    Left to itself (None), the assembler takes fewer for some cards, and spills: 64 for `down` on sm_80, 128 for several
    tokens on sm_120, and that of Triton 3.6 96 for `gate_up` in int4 on sm_100.
    """

    N: int
    C: int
    num_warps: int
    maxnreg: int | None


def tile(tokens: int, bits: int) -> Tile:
    """So that a thread has a chunk of eight outputs, or of four of several tokens: they share what it loads of these.

    With more than one token Triton lets each thread load what it needs only where there are more threads than numbers
    of tokens; else they are exchanged through shared memory, with two barriers a number.
    """
    return Tile(16, 32, 2, 128 if bits == 4 else None) if tokens == 1 else Tile(64, 16, 8, 168)


@triton.jit
def gemv_kernel(
    x,
    values,
    ranges,
    out,
    tokens,
    outputs,
    T: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out [tokens, outputs] = tokens x, prepared, times a matrix; a program makes N outputs of all tokens."""
    row, token = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, T)
    is_row, is_token = row < outputs, token < tokens
    sums = tl.zeros([T, N, C], tl.float32)
    for start in range(0, CHUNKS, C):
        sums = add_products(sums, x, token, is_token, values, ranges, row, is_row, start, CHUNKS, BITS, GROUP)
    found = tl.sum(sums, axis=2)
    if BITS == 8:
        found *= tl.load(ranges + row, mask=is_row, other=0)[None]
    tl.store(out + token[:, None] * outputs + row[None], found, mask=is_token[:, None] & is_row[None])


@triton.jit
def dequantize_kernel(
    values,
    ranges,
    out,
    outputs,
    inputs,
    N: tl.constexpr,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out [outputs, inputs]: the floats that are meant; a program makes C words of N rows."""
    row = (tl.program_id(0).to(tl.int64) * N + tl.arange(0, N))[:, None]
    at = (tl.program_id(1) * C + tl.arange(0, C))[None]
    held = (row < outputs) & (at < 4 * CHUNKS)
    word = tl.load(values + row * (4 * CHUNKS) + at, mask=held, other=0)[:, :, None]
    i = tl.arange(0, 32 // BITS)[None, None]
    if BITS == 4:
        both = tl.load(ranges + row * tl.cdiv(CHUNKS, GROUP // 32) + at // (GROUP // 8), mask=held, other=0)[:, :, None]
        scale, zero = (both & -65536).to(tl.float32, bitcast=True), (both << 16).to(tl.float32, bitcast=True)
        weight = (((word >> (4 * i)) & 15).to(tl.float32) - zero) * scale
    else:
        scale = tl.load(ranges + row, mask=row < outputs, other=0)[:, :, None]
        weight = (((word >> (8 * i)) & 255) - 128).to(tl.float32) * scale
    column = at[:, :, None] * (32 // BITS) + i
    place = out + row[:, :, None] * inputs + column
    tl.store(place, weight.to(out.dtype.element_ty), mask=held[:, :, None] & (column < inputs))


class CudaLinear(RowByRow):
    """A matrix of bfloat16, or in one of `SCHEMES`, on a card; packed, it is one `CudaMatrix` of all that was given.

    Of one to eight tokens all is in float32 but the weights. More are multiplied in `dtype`: bfloat16 with sums in
    float32. On a CPU, where a kernel is only interpreted, all is in float32.
    """

    keeps_nan = True

    def __init__(self, form: str, group: int = 0, device: torch.device | str = "cuda") -> None:
        self.form = form
        self.bits = BITS[form]
        self.quantization = form if form in SCHEMES else "none"
        self.group = group or (SCHEMES[form].group if form in SCHEMES else 0)
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.name = f"{form} triton"

    def pack(self, *weights: Tensor) -> Packed:
        if self.quantization == "none":
            stacked = torch.cat([weight.to(self.device, torch.bfloat16) for weight in weights])
            return CudaMatrix(self._words(stacked), stacked.new_zeros(1, 1, dtype=torch.float32), stacked.shape[1])
        return self.load(*(self.quantize(weight) for weight in weights))

    def quantize(self, weight: Tensor) -> QuantizedMatrix:
        if self.form == "int4":
            return int4.quantize(weight.to(self.device), self.group)
        return int8.quantize(weight.to(self.device))

    def load(self, *stored: QuantizedMatrix) -> Packed:
        check_scales(stored)
        values = torch.cat([part.values.to(self.device, non_blocking=True) for part in stored])
        values = self._words(values ^ -128 if self.form == "int8" else values)
        inputs = stored[0].values.shape[1] * (8 // self.bits)
        scale = torch.cat([part.scale.to(self.device, non_blocking=True) for part in stored])
        if self.form == "int8":
            return CudaMatrix(values, scale[:, None].contiguous(), inputs)
        zero = torch.cat([cast(Tensor, part.zero).to(self.device, non_blocking=True) for part in stored])
        # Little endian: the zero point is the lower half of the word.
        return CudaMatrix(values, torch.stack((zero, scale), dim=-1).view(torch.int32)[..., 0], inputs)

    def stored(self, matrix: CudaMatrix) -> QuantizedMatrix:
        """What `load` made it of, in the CPU's memory."""
        values, ranges = (part.cpu() for part in matrix[:2])
        values = values.view(torch.uint8)[:, : matrix.inputs * self.bits // 8].contiguous()
        if self.form == "int8":
            return QuantizedMatrix(values.view(torch.int8) ^ -128, ranges[:, 0].contiguous())
        zero, scale = ranges.view(torch.bfloat16).view(*ranges.shape, 2).unbind(-1)
        return QuantizedMatrix(values, scale.contiguous(), zero.contiguous())

    def _words(self, values: Tensor) -> Tensor:
        """Rows filled up to whole chunks, as words."""
        filled = pad(values, (0, -values.shape[1] % (CHUNK // 8 // values.itemsize)))
        return filled.contiguous().view(torch.int32)

    def nbytes(self, outputs: int, inputs: int) -> int:
        row = -(-inputs * self.bits // CHUNK) * CHUNK // 8
        return outputs * (row + (4 * -(-inputs // self.group) if self.group else 4 if self.form == "int8" else 0))

    def prepare(self, x: Tensor, inner: bool = False) -> Rows:
        return (x,)

    def run(self, x: Rows, packed: Packed) -> Tensor:
        matrix = cast(CudaMatrix, packed)
        if len(x[0]) <= GEMV_MAX_TOKENS:
            return self.gemv(prepared(x[0], self.bits, matrix.chunks), len(x[0]), matrix)
        return self.gemm(x[0], matrix)

    def gemv(self, x: Tensor, tokens: int, matrix: CudaMatrix) -> Tensor:
        """One to eight tokens, `prepared`: float32 [tokens, outputs]."""
        out = torch.empty(tokens, matrix.outputs, device=x.device)
        T = triton.next_power_of_2(tokens)
        made = tile(T, self.bits)
        constants = {"CHUNKS": matrix.chunks, "BITS": self.bits, "GROUP": self.group, **made._asdict(), **FUSED}
        with torch.cuda.device_of(x):
            gemv_kernel[(triton.cdiv(matrix.outputs, made.N),)](
                x, matrix.values, matrix.ranges, out, tokens, matrix.outputs, T=T, **constants
            )
        return out

    def gemm(self, x: Tensor, matrix: CudaMatrix) -> Tensor:
        """Many tokens: float32 [tokens, outputs], from a piece of the matrix after the other."""
        x = x.to(self.dtype)
        return torch.cat([linear(x, floats) for floats in self.floats(matrix, self.dtype)], dim=1).float()

    def floats(self, matrix: CudaMatrix, dtype: torch.dtype) -> Iterator[Tensor]:
        """Pieces [some outputs, inputs] of the floats that are meant, in order; of those that are there the whole."""
        if self.quantization == "none":
            yield matrix.values.view(torch.bfloat16)[:, : matrix.inputs].to(dtype)
            return
        step = max(1, PIECE // matrix.inputs)
        for start in range(0, matrix.outputs, step):
            values, ranges = matrix.values[start : start + step], matrix.ranges[start : start + step]
            out = torch.empty(len(values), matrix.inputs, dtype=dtype, device=values.device)
            constants = {"CHUNKS": matrix.chunks, "BITS": self.bits, "GROUP": self.group, **FUSED}
            grid = triton.cdiv(len(values), 16), triton.cdiv(values.shape[1], 64)
            with torch.cuda.device_of(values):
                dequantize_kernel[grid](values, ranges, out, len(values), matrix.inputs, N=16, C=64, **constants)
            yield out


def prepared(x: Tensor, bits: int, chunks: int) -> Tensor:
    """Tokens [tokens, inputs] as kernels read them beside weights of so many bits: float32, see `cuda_tiles`."""
    x = pad(x.float(), (0, chunks * (CHUNK // bits) - x.shape[1]))
    return x.view(len(x), chunks, CHUNK // bits).transpose(1, 2).contiguous()
