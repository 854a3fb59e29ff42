"""The C interface of the native kernels, as ctypes has it: `src/dbrx.h`, line by line."""

from __future__ import annotations

from ctypes import (
    CDLL,
    POINTER,
    Structure,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_void_p,
)
from enum import IntEnum, IntFlag
from typing import Any

ABI = 5
GEMV_MAX_ROWS = 16


class Format(IntEnum):
    """How a matrix's numbers are stored."""

    F32, BF16, INT8, INT4, INT3 = range(5)
    # Groups of inputs: 128 and the bits of a weight
    GROUPS_2, GROUPS_3, GROUPS_4, GROUPS_5, GROUPS_6, GROUPS_8 = 130, 131, 132, 133, 134, 136
    # ggml's blocks: 256 and ggml's number of a type
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = 258, 259, 262, 263, 264
    Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = range(266, 271)
    IQ4_NL, IQ4_XS = 276, 279


class Ranges(IntFlag):
    """Of groups of inputs: the type of scale and zero, and whether zero is a zero point."""

    RANGES_BF16, RANGES_F16, RANGES_F32, ZERO_POINTS = 0, 1, 2, 4


class Activation(IntEnum):
    """Between an expert's products."""

    SILU, GELU, RELU = range(3)


class Matrix(Structure):
    """A matrix [outputs, inputs] as it lies in memory."""

    _fields_ = (
        ("format", c_int32),
        ("transposed", c_int32),
        ("group", c_int32),
        ("ranges", c_int32),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("values", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
    )


class Expert(Structure):
    """silu(w1 x) * (v1 x), then w2."""

    _fields_ = (("w1", Matrix), ("v1", Matrix), ("w2", Matrix))


class Block(Structure):
    """What one block of the network needs."""

    _fields_ = (
        ("d_model", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("n_experts", c_int32),
        ("top_k", c_int32),
        ("activation", c_int32),
        ("normalize", c_int32),
        ("norm_order", c_float),
        ("clip", c_float),
        ("eps", c_float),
        ("reserved", c_float),
        ("norm_1", c_void_p),
        ("norm_2", c_void_p),
        ("Wqkv", Matrix),
        ("out_proj", Matrix),
        ("router", Matrix),
        ("experts", POINTER(Expert)),
    )


class KV(Structure):
    """A row's keys and values of one layer."""

    _fields_ = (
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        ("block_tokens", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
        ("format", c_int32),
        ("reserved", c_int32),
        ("position", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class Counters(Structure):
    """What one thread of a pool did."""

    _fields_ = (
        ("barriers", c_int64),
        ("sleeps", c_int64),
        ("waited_ns", c_int64),
        ("bytes", c_int64),
        ("operations", c_int64),
    )


STRUCTS = (Matrix, Expert, Block, KV, Counters)
# Arrays of numbers are addresses, as `Tensor.data_ptr()` gives them.
_matrix, _experts, _block, _kv = POINTER(Matrix), POINTER(Expert), POINTER(Block), POINTER(KV)
ANSWERS: dict[str, tuple[Any, ...]] = {  # what is returned, then what is taken
    "dbrx_abi": (c_int,),
    "dbrx_variant": (c_char_p,),
    "dbrx_runs_here": (c_int,),
    "dbrx_error": (c_char_p,),
    "dbrx_pool_create": (c_void_p, c_int),
    "dbrx_pool_destroy": (None, c_void_p),
    "dbrx_pool_threads": (c_int, c_void_p),
    "dbrx_replay": (c_int, c_void_p, c_void_p, c_int64, c_char_p, c_int64),
}
CALLS: dict[str, tuple[Any, ...]] = {  # what is taken; all return whether it failed
    "dbrx_pool_counters": (c_void_p, c_int, POINTER(Counters)),
    "dbrx_linear": (c_void_p, _matrix, c_void_p, c_int64, c_void_p),
    "dbrx_experts": (
        *(c_void_p, _experts, c_int32, c_int32, c_int32, c_int32, c_void_p, c_int64),
        *(c_void_p, c_void_p, c_int32, c_void_p, c_void_p),
    ),
    "dbrx_attend": (c_void_p, _block, c_int64, _kv, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "dbrx_step": (c_void_p, _block, c_int32, c_int64, _kv, c_void_p, c_void_p, c_void_p, c_void_p),
    "dbrx_head": (c_void_p, c_void_p, c_float, _matrix, c_void_p, c_int64, c_void_p),
    "dbrx_rows": (c_void_p, _matrix, c_void_p, c_int64, c_void_p),
    "dbrx_quantize": (c_void_p, _matrix, c_void_p, c_void_p, _matrix),
}


def declare(library: CDLL) -> None:
    """Give each function its types; one that fails raises `ValueError` with what the library says."""

    def check(failed: int, function: Any, arguments: tuple[Any, ...]) -> int:
        if failed:
            raise ValueError(library.dbrx_error().decode("utf-8", "replace"))
        return failed

    for name, (result, *taken) in ANSWERS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, taken
    for name, taken_here in CALLS.items():
        function = getattr(library, name)
        function.restype, function.argtypes, function.errcheck = c_int, taken_here, check
