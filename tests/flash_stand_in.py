"""The two functions of flash-attn 2 that the program calls, for machines without a GPU.

Same names, parameters, layouts and alignment (causal, to the end) as in the package's documentation; plain products.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """q [batch, seq_q, heads, head_dim]; k, v [batch, seq_k, kv_heads, head_dim] -> like q."""
    assert dropout_p == 0.0
    batch, seq_q, heads, head_dim = q.shape
    seq_k, kv_heads = k.shape[1:3]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    grouped = q.view(batch, seq_q, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped.float(), k.float()) * scale
    if causal:
        later = torch.arange(seq_k)[None, :] > torch.arange(seq_q)[:, None] + seq_k - seq_q
        scores[..., later] = float("-inf")
    out = torch.einsum("bhgqk,bkhd->bqhgd", scores.softmax(-1), v.float())
    return out.reshape(q.shape).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """The same on packed sequences: q [total_q, heads, head_dim]; k, v [total_k, kv_heads, head_dim]."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    out = torch.empty_like(q)
    for i in range(len(cu_seqlens_q) - 1):
        some_q, some_k = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        assert len(q[some_q]) <= max_seqlen_q and len(k[some_k]) <= max_seqlen_k
        if len(q[some_q]):
            part = (x[None] for x in (q[some_q], k[some_k], v[some_k]))
            out[some_q] = flash_attn_func(*part, dropout_p, softmax_scale, causal)[0]
    return out
