"""Attention by the package flash-attn, version 2 (github.com/Dao-AILab/flash-attention)."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from .plan import AttentionPlan


class FlashAttention:
    """`flash_attn_func` for equal rows, `flash_attn_varlen_func` on packed tokens otherwise.

    Since 2.1 the causal mask of both is aligned to the end, as the plan wants it. Grouped heads need no repeating.
    """

    def __init__(self, functions: ModuleType) -> None:
        self._functions = functions

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, plan: AttentionPlan) -> Tensor:
        if plan.uniform:
            out: Tensor = self._functions.flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
            return out
        return self._packed(q, k, v, scale, plan)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: AttentionPlan) -> Tensor:
        """Rows of different lengths as one run of tokens [total, heads, head_dim] with cumulative lengths."""
        counts = torch.tensor(plan.lengths, device=q.device)
        held = torch.arange(k.shape[1], device=q.device) < counts[:, None]
        asked = plan.valid.to(q.device) if plan.valid is not None else q.new_ones(q.shape[:2], dtype=torch.bool)
        out = torch.zeros_like(q)
        out[asked] = self._functions.flash_attn_varlen_func(
            q[asked],
            k[held],
            v[held],
            cu_seqlens_q=_cumulative(asked.sum(1)),
            cu_seqlens_k=_cumulative(counts),
            max_seqlen_q=plan.seq,
            max_seqlen_k=plan.kv_len,
            softmax_scale=scale,
            causal=True,
        )
        return out


def _cumulative(lengths: Tensor) -> Tensor:
    """Lengths [batch] -> where each row begins and the last one ends, int32 [batch + 1]."""
    return pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def build() -> FlashAttention:
    import flash_attn

    return FlashAttention(flash_attn)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"flash attention needs an NVIDIA GPU, and the model is on {device.type}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed: pip install 'dbrx-cli[flash]'"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    return None
