"""Attention written out: the definition that the other backends are compared with."""

import torch
from torch import Tensor

from .plan import AttentionPlan


class EagerAttention:
    """Scores, softmax in float32, weighted sum."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, plan: AttentionPlan) -> Tensor:
        return self.with_weights(q, k, v, scale=scale, plan=plan)[0]

    def with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """The output [batch, seq, n_heads, head_dim] and the weights [batch, n_heads, seq, kv_len]."""
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        scores = scores.masked_fill(~plan.mask(q.device), -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v), weights


def build() -> EagerAttention:
    return EagerAttention()


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None
