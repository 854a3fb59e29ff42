"""Norms and the router on a card: what lies between attention and experts of a decode step, a program a token."""

from __future__ import annotations

import triton
import triton.language as tl

from .cuda_tiles import place_of

AT_ONCE = 512  # numbers of a token that the router meets at once, for each of its experts


@triton.jit
def normalize(value, token, i, is_input, weight, out, width, eps, CHUNKS: tl.constexpr, BITS: tl.constexpr):
    """Write the LayerNorm of a token's numbers `value`, prepared for a matrix; gives their mean and deviation."""
    mean = tl.sum(value) / width
    centred = tl.where(is_input, value - mean, 0)
    deviation = tl.sqrt(tl.sum(centred * centred) / width + eps)
    normed = centred / deviation * tl.load(weight + i, mask=is_input, other=0)
    to = out + token * (128 // BITS * CHUNKS) + place_of(i, CHUNKS, BITS)
    tl.store(to, normed, mask=i < 128 // BITS * CHUNKS)
    return mean, deviation


@triton.jit
def norm_kernel(x, weight, out, width, eps, W: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr):
    """out: LayerNorm of x [tokens, width], prepared for a matrix, whose places are at most W, a power of two."""
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, W)
    is_input = i < width
    value = tl.load(x + token * width + i, mask=is_input, other=0)
    normalize(value, token, i, is_input, weight, out, width, eps, CHUNKS, BITS)


@triton.jit
def router_kernel(
    x,
    y,
    weight,
    router,
    residual,
    normed,
    probabilities,
    expert_ids,
    router_weights,
    width,
    n_experts,
    eps,
    order,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
):
    """residual = x + y [tokens, width]; normed: its LayerNorm, prepared for experts; and what the router makes of it.

    router [n_experts, width]; probabilities [tokens, n_experts]; expert_ids and router_weights [tokens, TOP_K], the
    best first, of equal ones the first; NORMALIZE: divided by their norm of an order, which is positive. E, K: powers
    of two, at least n_experts and TOP_K.
    """
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, W)
    is_input = i < width
    at = token * width + i
    value = tl.load(x + at, mask=is_input, other=0) + tl.load(y + at, mask=is_input, other=0)
    tl.store(residual + at, value, mask=is_input)
    mean, deviation = normalize(value, token, i, is_input, weight, normed, width, eps, CHUNKS, BITS)

    expert = tl.arange(0, E)
    is_expert = expert < n_experts
    products = tl.zeros([E, AT_ONCE], tl.float32)
    for start in range(0, width, AT_ONCE):
        # Once more, not what was stored: other threads stored it.
        j = start + tl.arange(0, AT_ONCE)
        is_there, at_j = j < width, token * width + j
        part = tl.load(x + at_j, mask=is_there, other=0) + tl.load(y + at_j, mask=is_there, other=0)
        part = (part - mean) / deviation * tl.load(weight + j, mask=is_there, other=0)
        rows = router + expert[:, None] * width + j[None]
        products += tl.load(rows, mask=is_expert[:, None] & is_there[None], other=0).to(tl.float32) * part[None]
    logits = tl.where(is_expert, tl.sum(products, axis=1), -float("inf"))
    shares = tl.exp(logits - tl.max(logits))
    shares /= tl.sum(shares)
    tl.store(probabilities + token * n_experts + expert, shares, mask=is_expert)

    k = tl.arange(0, K)
    best, chosen, left = tl.zeros([K], tl.float32), tl.zeros([K], tl.int32), tl.where(is_expert, shares, -1.0)
    for place in tl.static_range(TOP_K):
        highest, first = tl.max(left), tl.argmax(left, axis=0)
        best, chosen = tl.where(k == place, highest, best), tl.where(k == place, first, chosen)
        left = tl.where(expert == first, -1.0, left)
    if NORMALIZE:
        is_chosen = best > 0
        powers = tl.where(is_chosen, tl.exp2(order * tl.log2(tl.where(is_chosen, best, 1.0))), 0.0)
        best /= tl.exp2(tl.log2(tl.sum(powers)) / order)
    tl.store(expert_ids + token * TOP_K + k, chosen, mask=k < TOP_K)
    tl.store(router_weights + token * TOP_K + k, best, mask=k < TOP_K)
