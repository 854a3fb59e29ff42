"""What all decode kernels on a card share: a tile of weights times tokens, read 128 bits at a time.

A matrix [outputs, inputs] lies row by row in words of 32 bits, each row filled up with zeros to whole chunks of four
words: the most that a thread loads at once. A chunk holds 32 weights of int4, 16 of int8, 8 of bfloat16. A thread has
whole chunks of a row, so nothing is exchanged between threads before the sums of a row's chunks are added up. Bytes of
int8 are held 128 too large, without a sign.

Tokens are prepared for that, so that neighbouring threads, which have neighbouring chunks, read neighbouring numbers:
x [tokens, inputs] is held as [tokens, weights of a chunk, chunks]. In int4, input 74 of 6144 is weight 74 % 32 = 10 of
chunk 74 // 32 = 2, one of 192 chunks, and lies at 10 x 192 + 2; in its row it is the third weight (10 % 8 = 2) of word
10 // 8 = 1 of the chunk. With groups of 128 it shares the scale of group 2 // (128 // 32) = 0.

Shapes have these axes: T tokens, N outputs, C chunks.

Triton launches on the current card, wherever its arguments lie: whoever launches makes theirs the current one
(`torch.cuda.device_of`).
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 128  # bits
FUSED = {"enable_fp_fusion": True}  # of each launch: a product and a sum at once. Triton 3.10 does not by itself


@triton.jit
def add_products(
    sums,
    x,
    token,
    is_token,
    values,
    ranges,
    row,
    is_row,
    start,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """sums [T, N, C] and the products of tokens with C of a row's CHUNKS chunks, from `start`, of rows of a matrix.

    ranges: of int4 a word a group, its scale above its zero point, both bfloat16. Other formats have none here: the
    scale of an output is for who adds up the chunks.
    """
    N: tl.constexpr = sums.shape[1]
    C: tl.constexpr = sums.shape[2]
    chunk = start + tl.arange(0, C)
    is_chunk = chunk < CHUNKS
    held = is_row[:, None] & is_chunk[None]
    word = start * 4 + tl.arange(0, 4 * C)
    place = row[:, None].to(tl.int64) * (4 * CHUNKS) + word[None]
    loaded = tl.load(values + place, mask=is_row[:, None] & (word < 4 * CHUNKS)[None], other=0)
    even, odd = tl.split(tl.reshape(loaded, [N, C, 2, 2]))
    word_0, word_2 = tl.split(even)
    word_1, word_3 = tl.split(odd)
    found = tl.zeros_like(sums)
    total = tl.zeros([sums.shape[0], C], tl.float32)
    at = x + token[:, None] * (128 // BITS * CHUNKS) + chunk[None]
    mask = is_token[:, None] & is_chunk[None]
    found, total = add_word(found, total, word_0, at, mask, 0, CHUNKS, BITS)
    found, total = add_word(found, total, word_1, at, mask, 1, CHUNKS, BITS)
    found, total = add_word(found, total, word_2, at, mask, 2, CHUNKS, BITS)
    found, total = add_word(found, total, word_3, at, mask, 3, CHUNKS, BITS)
    if BITS == 8:
        found -= 128 * total[:, None]
    elif BITS == 4:
        group = row[:, None].to(tl.int64) * tl.cdiv(CHUNKS, GROUP // 32) + chunk[None] // (GROUP // 32)
        # One group a thread, and neighbours along a row, as its chunks lie: else threads would have to exchange them.
        group = tl.max_contiguous(tl.multiple_of(group, (1, 1)), (1, 2))
        word = tl.load(ranges + group, mask=held, other=0)
        scale, zero = (word & -65536).to(tl.float32, bitcast=True), (word << 16).to(tl.float32, bitcast=True)
        found = scale[None] * (found - zero[None] * total[:, None])
    return sums + found


@triton.jit
def add_word(found, total, word, at, mask, number: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr):
    """found [T, N, C] and products with word [N, C], the `number`th of its chunks; and total [T, C] of the tokens."""
    for i in tl.static_range(32 // BITS):
        x = tl.load(at + (number * (32 // BITS) + i) * CHUNKS, mask=mask, other=0)
        total += x
        if BITS == 16:
            weight = ((word << 16) if i == 0 else (word & -65536)).to(tl.float32, bitcast=True)
        else:
            # Bits are not shifted: 9 in bits 8 to 11 makes 9 x 256. The token is divided instead, once for all rows.
            weight = (word.to(tl.uint32, bitcast=True) & (((1 << BITS) - 1) << (BITS * i))).to(tl.float32)
            x *= 1 / (1 << (BITS * i))
        found += weight[None] * x[:, None]
    return found, total


@triton.jit
def place_of(i, CHUNKS: tl.constexpr, BITS: tl.constexpr):
    """Where input i lies in a prepared token."""
    return i % (128 // BITS) * CHUNKS + i // (128 // BITS)


@triton.jit
def pointer(address):
    """To words at an address of a table, which is a multiple of 16: so they are loaded 128 bits at a time."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
