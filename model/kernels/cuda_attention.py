"""Attention of a decode step on a card: a token a row, against keys and values that lie in blocks.

Rows are read where they lie: a table has the address of each block, and how far a row has come is read on the card. A
row's tokens are split between programs, so that a lone row keeps the card busy (Flash-Decoding, Dao et al. 2023); each
keeps a running maximum and sum, and another kernel puts their results together, in their order.

The table of a layer is [rows, 2, BLOCKS]: of each row the addresses of its blocks of keys, then those of values. Token
600 of a row lies in block 600 // 256 = 2, at its place 88. A block is [kv_heads, TOKENS, head_dim].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cuda_tiles import place_of

SPLITS = 16  # programs that share a row's tokens, for each head of keys: 128 of a lone row of DBRX
TILE = 64  # tokens at once; a block has a whole number of them


@triton.jit
def clipped(x, clip):
    """Not tl.clamp, which would make a number of NaN."""
    return tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))


@triton.jit
def turned(qkv, cos, sin, head, i, mask, clip, head_dim):
    """Numbers i of heads of qkv, clipped, then turned by their position's angles; see `rope.rotate`."""
    swapped = (i + head_dim // 2) % head_dim
    value = clipped(tl.load(qkv + head * head_dim + i, mask=mask, other=0), clip)
    other = clipped(tl.load(qkv + head * head_dim + swapped, mask=mask, other=0), clip)
    return value * tl.load(cos + i, mask=mask, other=0) + other * tl.load(sin + i, mask=mask, other=0)


@triton.jit
def append_kernel(
    qkv,
    cos,
    sin,
    positions,
    table,
    clip,
    head_dim,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    KV: tl.constexpr,
):
    """Write the key and the value of each row of qkv [rows, heads of queries, keys and values] behind its tokens.

    cos, sin [rows, head_dim]; positions [rows]: tokens that are there; D: a power of two, at least head_dim.
    """
    row, head, i = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    is_number, position = i < head_dim, tl.load(positions + row)
    qkv += row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * head_dim)
    at, angles = (head * TOKENS + position % TOKENS) * head_dim + i, row * head_dim
    address = table + row * (2 * BLOCKS) + position // TOKENS
    key = turned(qkv, cos + angles, sin + angles, HEADS + head, i, is_number, clip, head_dim)
    tl.store(tl.load(address).to(tl.pointer_type(KV)) + at, key.to(KV), mask=is_number)
    value = clipped(tl.load(qkv + (HEADS + KV_HEADS + head) * head_dim + i, mask=is_number, other=0), clip)
    tl.store(tl.load(address + BLOCKS).to(tl.pointer_type(KV)) + at, value.to(KV), mask=is_number)


@triton.jit
def attend_kernel(
    qkv,
    cos,
    sin,
    positions,
    table,
    sums,
    tops,
    totals,
    clip,
    scale,
    head_dim,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    KV: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """What a split of a row's tokens gives the query heads of a key head.

    sums [rows, HEADS, SPLITS, head_dim]: values, weighted; totals [rows, HEADS, SPLITS]: the sum of their weights,
    which are exp2(score - top); tops: the highest score, in the base of 2. GROUP: a power of two, at least the query
    heads of a key head, and 16, as products want. An empty split has the top -infinity and zeros.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, of_group, t = tl.arange(0, D), tl.arange(0, GROUP), tl.arange(0, TILE)
    query = head * (HEADS // KV_HEADS) + of_group
    is_number, is_query = i < head_dim, of_group < HEADS // KV_HEADS
    is_both, angles = is_query[:, None] & is_number[None], row * head_dim
    qkv += row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * head_dim)
    q = turned(qkv, cos + angles, sin + angles, query[:, None], i[None], is_both, clip, head_dim)
    q = (q * (scale * 1.4426950408889634)).to(KV)  # 1 / ln 2, for exp2

    length = tl.load(positions + row) + 1
    each = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    first, last = split * each, tl.minimum(length, split * each + each)
    top, total = tl.full([GROUP], -float("inf"), tl.float32), tl.zeros([GROUP], tl.float32)
    found = tl.zeros([GROUP, D], tl.float32)
    for start in range(first, last, TILE):
        address = table + row * (2 * BLOCKS) + start // TOKENS
        keys, values = tl.load(address).to(tl.pointer_type(KV)), tl.load(address + BLOCKS).to(tl.pointer_type(KV))
        keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
        at = (head * TOKENS + start % TOKENS + t) * head_dim
        is_token = start + t < last
        held = is_token[:, None] & is_number[None]
        key = tl.load(keys + at[:, None] + i[None], mask=held, other=0)
        score = tl.where(is_token[None], tl.dot(q, tl.trans(key), input_precision="ieee"), -float("inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        share, less = tl.exp2(score - higher[:, None]), tl.exp2(top - higher)
        value = tl.load(values + at[:, None] + i[None], mask=held, other=0)
        found = found * less[:, None] + tl.dot(share.to(KV), value, input_precision="ieee")
        total, top = total * less + tl.sum(share, axis=1), higher
    at = (row * HEADS + query) * SPLITS + split
    tl.store(sums + at[:, None].to(tl.int64) * head_dim + i[None], found, mask=is_both)
    tl.store(tops + at, top, mask=is_query)
    tl.store(totals + at, total, mask=is_query)


@triton.jit
def merge_kernel(
    sums,
    tops,
    totals,
    out,
    head_dim,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
):
    """out [rows, HEADS * head_dim]: what all splits of a row give each head, prepared for `out_proj`."""
    row, head, i, split = tl.program_id(0), tl.program_id(1), tl.arange(0, D), tl.arange(0, SPLITS)
    at, is_number = (row * HEADS + head) * SPLITS + split, i < head_dim
    top = tl.load(tops + at)
    share = tl.exp2(top - tl.max(top))
    total = tl.sum(share * tl.load(totals + at))
    found = tl.load(sums + at[:, None].to(tl.int64) * head_dim + i[None], mask=is_number[None], other=0)
    to = out + row.to(tl.int64) * (128 // BITS * CHUNKS) + place_of(head * head_dim + i, CHUNKS, BITS)
    tl.store(to, tl.sum(found * share[:, None], axis=0) / total, mask=is_number)
