"""Writes model/native/vectors.bin: calls of the native kernels, with answers that numpy finds in float64.

    .venv/bin/python -m tests.make_native_vectors

Inputs and weights are random numbers that `model/native/src/replay.cpp` makes again; answers only are in the file. What
quantizing should give is asked of `model/quantization/`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from math import erf, inf
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from model.native.abi import Format, Ranges
from model.quantization import BLOCKS, GROUP_BITS, int3, int4, int8

PATH = Path(__file__).parent.parent / "model" / "native" / "vectors.bin"
F32, BF16, INT8, INT4, INT3 = range(5)
GROUPS = {bits: int(Format[f"GROUPS_{bits}"]) for bits in GROUP_BITS}
BITS = {INT4: 4, INT3: 3} | {form: bits for bits, form in GROUPS.items()}  # of levels, with ranges for each group
NAMES = {int(form): form.name.lower() for form in Format}
HALVES = {  # bytes of a block in which a float of 16 bits begins
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
LINEAR, HEAD, EXPERTS, STEP, QUANTIZE, ROW = range(6)
# Of a row's norm, up to so many rows and beyond: activations have 16 bits, or 8 with a scale for each group; many rows
# may be rounded to bfloat16, or to 8 bits. A number that is left out, or taken twice, is 5 % or more, but for peaks.
GEMV_ROWS = 16
TOLERANCE = {F32: (1e-5, 1e-5), BF16: (1e-5, 5e-3), INT8: (1e-3, 1e-2), INT4: (1e-2, 1e-2), INT3: (1e-2, 1e-2)}
TOLERANCE |= dict.fromkeys([*(int(Format[kind]) for kind in BLOCKS), *GROUPS.values()], (1e-3, 1e-3))
_streams = count(1000, 1000)

Floats = np.ndarray[Any, np.dtype[np.float64]]


# ---- numbers, as replay.cpp makes them


def random(stream: int, n: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    z = (np.uint64(stream << 32) + np.arange(1, n + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(stream: int, *shape: int) -> Any:
    """float32 in [-1, 1)."""
    numbers = (random(stream, int(np.prod(shape))) >> np.uint64(40)).astype(np.float32)
    return (numbers / np.float32(2**23) - np.float32(1)).reshape(shape)


def peaked(stream: int, *shape: int) -> Any:
    """The same, every 97th number 64 times as large."""
    found = uniform(stream, *shape)
    found.reshape(-1)[13::97] *= np.float32(64)
    return found


def cut(x: Any) -> Any:
    """float32 -> bfloat16, towards zero, in a float32."""
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def nearest_bf16(x: Floats) -> Floats:
    return torch.tensor(x).float().bfloat16().double().numpy()


# ---- matrices


@dataclass(frozen=True)
class Shape:
    format: int
    outputs: int
    inputs: int
    transposed: bool = False
    group: int = 0
    ranges: int = 0

    def pack(self) -> bytes:
        return struct.pack("<6i", self.format, self.transposed, self.group, self.ranges, self.outputs, self.inputs)

    def __str__(self) -> str:
        return f"{NAMES[self.format]} {self.outputs}x{self.inputs}" + ", transposed" * self.transposed

    def numbers(self, stream: int) -> Floats:
        """The numbers that are meant, [outputs, inputs]."""
        n, sides = self.outputs * self.inputs, (self.outputs, self.inputs)
        if self.format in (F32, BF16):
            values = uniform(stream, n) if self.format == F32 else cut(uniform(stream, n))
            shaped = values.reshape(sides[::-1]).T if self.transposed else values.reshape(sides)
            return shaped.astype(np.float64)
        if self.format == INT8:
            values = (random(stream, n) >> np.uint64(56)).astype(np.uint8).view(np.int8).reshape(sides)
            scale = (np.float32(2) + uniform(stream + 1, self.outputs)) / np.float32(256)
            return values.astype(np.float64) * scale.astype(np.float64)[:, None]
        if self.format not in BITS:
            kind = Format(self.format).name
            return gguf.dequantize(blocks(stream, kind, *sides), gguf.GGMLQuantizationType[kind]).astype(np.float64)
        groups = -(-self.inputs // self.group)
        bits = BITS[self.format]
        packed = (random(stream, n * bits // 8) >> np.uint64(56)).astype(np.uint8).reshape(self.outputs, -1)
        levels, middle = levels_of(packed, bits, self.inputs, self.format == INT3), np.float32(2 ** (bits - 1))
        scale = cut((np.float32(2) + uniform(stream + 1, self.outputs, groups)) / np.float32(16))
        zero = cut(middle + middle / 2 * uniform(stream + 2, self.outputs, groups))
        if self.format in GROUPS.values() and not self.ranges & Ranges.ZERO_POINTS:
            return levels * self._spread(scale) - self._spread(zero) / 8
        return (levels - self._spread(zero)) * self._spread(scale)

    def _spread(self, parts: Any) -> Floats:
        return np.repeat(parts.astype(np.float64), self.group, axis=1)[:, : self.inputs]


def levels_of(packed: Any, bits: int, inputs: int, planes: bool = False) -> Floats:
    """Bit by bit, the first input lowest; planes: of 3 bits the lower two of all inputs come first, then the third."""
    found, low = np.unpackbits(packed, axis=1, bitorder="little"), 2 if planes else bits
    levels = found[:, : inputs * low].reshape(len(packed), inputs, low) @ 2.0 ** np.arange(low)
    return levels + 4 * found[:, 2 * inputs :] if planes else levels


def blocks(stream: int, kind: str, outputs: int, inputs: int) -> Any:
    """Random bytes; floats of 16 bits are between 2^-6 and 2^-5, with either sign."""
    block = BLOCKS[kind]
    made = (random(stream, outputs * inputs // block.inputs * block.nbytes) >> np.uint64(56)).astype(np.uint8)
    for half in HALVES[kind]:
        made[half + 1 :: block.nbytes] = made[half + 1 :: block.nbytes] & 0x83 | 0x24
    return made.reshape(outputs, -1)


def shape(form: int, outputs: int, inputs: int, group: int = 32, ranges: int = 0) -> Shape:
    return Shape(form, outputs, inputs, group=128 if form == INT3 else group if form in BITS else 0, ranges=ranges)


def case(name: str, kind: int, tolerance: float, *parts: bytes) -> bytes:
    return struct.pack("<48sif", name.encode(), kind, tolerance) + b"".join(parts)


def floats(x: Any) -> bytes:
    return np.ascontiguousarray(x, "<f4").tobytes()


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


# ---- calls


def linear(matrix: Shape, n: int, peaks: bool = False) -> bytes:
    stream = next(_streams)
    x = (peaked if peaks else uniform)(stream, n, matrix.inputs)
    y = x.astype(np.float64) @ matrix.numbers(stream + 1).T
    tolerance = TOLERANCE[matrix.format][n > GEMV_ROWS]
    if peaks and matrix.format in BITS:
        tolerance *= 2
    parts = numbers(n, peaks, stream), matrix.pack(), numbers(stream + 1), floats(y)
    return case(f"{matrix}, {n} rows" + " with peaks" * peaks, LINEAR, tolerance, *parts)


def layer_norm(x: Floats, weight: Any, eps: float) -> Floats:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float64(np.float32(eps))) * weight


def head(matrix: Shape, n: int, normed: bool) -> bytes:
    stream, eps = next(_streams), 1e-5
    x = uniform(stream, n, matrix.inputs).astype(np.float64)
    if normed:
        x = layer_norm(x, uniform(stream + 1, matrix.inputs), eps)
    y = x @ matrix.numbers(stream + 2).T
    parts = numbers(n, stream, normed), struct.pack("<f", eps), matrix.pack(), numbers(stream + 2), floats(y)
    return case(f"head {matrix}, {n} rows", HEAD, TOLERANCE[matrix.format][0], *parts)


ACTIVATIONS = (
    lambda x: x / (1 + np.exp(-x)),
    lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    lambda x: np.maximum(x, 0),
)


def sum_of_experts(up: Shape, down: Shape, stream: int, activation: int, x: Floats, ids: Any, weights: Any) -> Floats:
    out = np.zeros_like(x)
    for expert in range(int(ids.max()) + 1):
        w1, v1, w2 = (s.numbers(stream + 4 * (3 * expert + i)) for i, s in enumerate((up, up, down)))
        inner = ACTIVATIONS[activation](x @ w1.T) * (x @ v1.T)
        out += (inner @ w2.T) * np.where(ids == expert, weights, 0).sum(-1, keepdims=True)
    return out


def experts(form: int, n: int, d: int, hidden: int, n_experts: int, top_k: int, activation: int = 0) -> bytes:
    stream = next(_streams)
    up, down = shape(form, hidden, d), shape(form, d, hidden)
    if form in (F32, BF16):
        down = replace(down, transposed=True)
    ids = np.random.default_rng(n).permuted(np.tile(np.arange(n_experts), (n, 1)), axis=1)[:, :top_k]
    x, weights = uniform(stream, n, d).astype(np.float64), uniform(stream + 1, n, top_k).astype(np.float64)
    out = sum_of_experts(up, down, stream + 10, activation, x, ids, weights)
    many = n * top_k > GEMV_ROWS * n_experts
    parts = (
        *(numbers(n, d, n_experts, top_k, activation, stream), up.pack(), down.pack(), numbers(stream + 10)),
        *(numbers(*ids.reshape(-1)), floats(out)),
    )
    return case(f"experts {up}, {n} rows", EXPERTS, 3 * TOLERANCE[form][many], *parts)


def step(*settings: Any, **more: Any) -> bytes:
    """With random numbers by which no two experts are nearly as good."""
    return next(filter(None, (_step(stream, *settings, **more) for stream in _streams)))


def _step(
    stream: int, form: int, kv_format: int, by_head: bool, positions: tuple[int, ...], grouped: tuple[int, int, int],
    block: int, clip: float = 8, order: float = 1, activation: int = 0,
) -> bytes | None:  # fmt: skip
    (heads, kv_heads, head_dim), d, n_experts, top_k, hidden, eps = grouped, 64, 6, 3, 48, 1e-5
    n, width = len(positions), kv_heads * head_dim
    Wqkv, out_proj = shape(form, (heads + 2 * kv_heads) * head_dim, d), shape(form, d, heads * head_dim)
    router = shape(F32, n_experts, d)
    up, down = shape(form, hidden, d), shape(form, d, hidden)
    if form in (F32, BF16):
        down = replace(down, transposed=True)
    norm_1, norm_2 = uniform(stream + 1, d), uniform(stream + 2, d)
    x = uniform(stream, n, d).astype(np.float64)
    qkv = np.clip(layer_norm(x, norm_1, eps) @ Wqkv.numbers(stream + 3).T, -clip, clip)
    qkv = qkv.reshape(n, heads + 2 * kv_heads, head_dim)
    y, keys, values = np.zeros((n, heads, head_dim)), np.zeros((n, width)), np.zeros((n, width))
    for i, position in enumerate(positions):
        of_row = stream + 10 + 4 * i
        cos, sin = uniform(of_row + 2, head_dim).astype(np.float64), uniform(of_row + 3, head_dim).astype(np.float64)
        qk = qkv[i, : heads + kv_heads]
        qk = qk * cos + np.roll(qk, head_dim // 2, axis=-1) * sin
        k, v = qk[heads:], qkv[i, heads + kv_heads :]
        k, v = (k, v) if kv_format == F32 else (nearest_bf16(k), nearest_bf16(v))
        blocks = position // block + 1
        past = []
        for part, new in enumerate((k, v)):
            sides = (blocks, kv_heads, block, head_dim) if by_head else (blocks, block, kv_heads, head_dim)
            kept = uniform(of_row + part, *sides)
            kept = (kept if kv_format == F32 else cut(kept)).astype(np.float64)
            kept = kept.transpose(0, 2, 1, 3) if by_head else kept
            past.append(np.concatenate((kept.reshape(-1, kv_heads, head_dim)[:position], new[None])))
        for h in range(heads):
            scores = past[0][:, h * kv_heads // heads] @ qk[h] * head_dim**-0.5
            shares = np.exp(scores - scores.max())
            y[i, h] = shares / shares.sum() @ past[1][:, h * kv_heads // heads]
        keys[i], values[i] = k.reshape(-1), v.reshape(-1)
    x = x + y.reshape(n, -1) @ out_proj.numbers(stream + 5).T
    normed = layer_norm(x, norm_2, eps)
    logits = normed @ router.numbers(stream + 7).T
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    ids = np.argsort(-probabilities, axis=-1)[:, :top_k]
    ordered = -np.sort(-probabilities, axis=-1)
    if (ordered[:, :top_k] < 1.2 * ordered[:, 1 : top_k + 1]).any():
        return None
    weights = np.take_along_axis(probabilities, ids, axis=-1)
    if order:
        weights = weights / np.linalg.norm(weights, order, axis=-1, keepdims=True)
    out = x + sum_of_experts(up, down, stream + 40, activation, normed, ids, weights)
    parts = (
        numbers(n, d, heads, kv_heads, head_dim, n_experts, top_k, activation, order > 0),
        struct.pack("<3f", order, clip, eps),
        numbers(block, by_head, kv_format, stream),
        *(part for i, m in enumerate((Wqkv, out_proj, router)) for part in (m.pack(), numbers(stream + 3 + 2 * i))),
        *(up.pack(), down.pack(), numbers(stream + 40), numbers(*positions)),
        *(floats(part) for part in (x, normed, keys, values, probabilities, weights)),
        *(numbers(*ids.reshape(-1)), floats(out)),
    )
    # What an expert weighs is the exponential of a sum, which multiplies the errors before it.
    rounding = 6 * TOLERANCE[form][0] + (5e-3 if kv_format == BF16 else 1e-5)
    return case(f"block {NAMES[form]}, cache {NAMES[kv_format]}", STEP, rounding, *parts)


def quantize(floats_: Shape, to: Shape, scaled: bool) -> bytes:
    stream = next(_streams)
    weight = torch.tensor(floats_.numbers(stream)).float()
    if scaled:
        weight = weight * torch.tensor(uniform(stream + 3, to.outputs))[:, None]
        weight = weight * torch.tensor(uniform(stream + 4, to.inputs))
    if to.format == INT8:
        wanted = int8.dequantize(int8.quantize(weight))
    else:
        numbers_of = int4 if to.format == INT4 else int3
        wanted = numbers_of.dequantize(numbers_of.quantize(weight, to.group), to.group)
    parts = floats_.pack(), numbers(stream), to.pack(), numbers(scaled, stream + 3), floats(wanted.numpy())
    return case(f"quantize {floats_} to {NAMES[to.format]}", QUANTIZE, 1e-2, *parts)


def row(matrix: Shape, at: int) -> bytes:
    stream = next(_streams)
    parts = matrix.pack(), numbers(stream, at), floats(matrix.numbers(stream)[at])
    return case(f"row of {matrix}", ROW, 0, *parts)


def cases() -> Iterator[bytes]:
    """All calls, with odd sizes, few and many rows, every format."""
    for form in (F32, BF16, INT8, INT4):
        for n in (1, 3, 16, 19):
            yield linear(shape(form, 37, 160), n)
        for n in (1, 5, 33):
            yield linear(shape(form, 72, 256, group=128), n, peaks=n > 1)
        yield linear(shape(form, 19, 50), 2)  # a short group, and no whole vector
        yield linear(shape(form, 20, 1300), 18)  # longer than what is held in cache at once
        yield head(shape(form, 101, 64), 1, normed=True)
        yield head(shape(form, 101, 64), 3, normed=False)
        for n in (1, 3, 30):
            yield experts(form, n, d=64, hidden=96, n_experts=3, top_k=2)
        yield experts(form, 2, d=48, hidden=40, n_experts=5, top_k=4, activation=1 + form % 2)
        # One to six queries that share a key head, and more; heads of no whole vectors; blocks of less than a tile.
        heads = (4, 2, 16), (6, 1, 24), (8, 1, 12), (5, 1, 16)
        yield step(form, F32, form % 2 == 0, (0, 5, 301), heads[form], (8, 40, 64, 256)[form])
        heads = (2, 2, 20), (3, 1, 32), (7, 1, 16), (4, 2, 30)
        place = form % 2 == 1, ((16,), (95,), (330,), (299,))[form], heads[form], (8, 32, 256, 70)[form]
        yield step(form, BF16, *place, clip=0.5 if form else inf, order=form, activation=form % 3)
    for form in (F32, BF16):
        yield linear(Shape(form, 40, 96, transposed=True), 1)
        yield linear(Shape(form, 40, 96, transposed=True), 20)
        for to in (shape(INT8, 12, 80), shape(INT4, 12, 80), shape(INT4, 12, 80, group=64)):
            for transposed in (False, True):
                yield quantize(Shape(form, 12, 80, transposed), to, scaled=transposed)
    for n in (1, 3, 16):
        yield linear(shape(INT3, 37, 160), n)
    for n in (1, 5, 17):
        yield linear(shape(INT3, 72, 256), n, peaks=n > 1)
    yield linear(shape(INT3, 19, 56), 2)
    yield linear(shape(INT3, 20, 1304), 18)
    for n in (1, 3, 30):
        yield experts(INT3, n, d=64, hidden=96, n_experts=3, top_k=2)
    yield quantize(Shape(F32, 4, 136), shape(INT3, 4, 136), scaled=False)
    yield quantize(Shape(BF16, 4, 136, True), shape(INT3, 4, 136), scaled=True)
    yield experts(int(Format.Q4_K), 1, d=256, hidden=256, n_experts=3, top_k=2)
    yield experts(int(Format.Q8_0), 17, d=64, hidden=96, n_experts=3, top_k=2)
    for kind, block in BLOCKS.items():
        form, inputs = int(Format[kind]), 512 if block.inputs == 256 else 288  # whole spans of 256, and not
        for n in (1, 4, 17):
            yield linear(shape(form, 7, inputs), n, peaks=n == 4)
        yield row(shape(form, 2, block.inputs), 1)
    every = [ranges | zeros for ranges in range(3) for zeros in (Ranges.ZERO_POINTS, 0)]
    for (bits, form), ranges in zip(GROUPS.items(), every, strict=True):
        group = (32, 64, 128)[bits % 3]
        yield linear(shape(form, 6, 584, group, ranges), 1)  # spans of 256 that are not whole
        if bits in (3, 4):
            yield linear(shape(form, 4, 328, group, ranges), 17)


def main() -> None:
    PATH.write_bytes(b"".join(cases()))
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
