"""Experts whose weights lie in memory as the checkpoint stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..kernels import FloatGlu, Packed
from ..kernels.dispatch import moe_forward


class ExpertWeights(nn.Module):
    """All experts of a layer, stacked: w1, v1, w2 [experts * hidden, d_model] each (the checkpoint's `mlp`).

    w2 is stored untransposed: expert e's slice is [hidden, d_model], to be used as h @ w2.
    """

    def __init__(self, n_experts: int, hidden: int, d_model: int) -> None:
        super().__init__()
        for name in ("w1", "v1", "w2"):
            self.register_parameter(name, nn.Parameter(torch.empty(n_experts * hidden, d_model)))

    w1: nn.Parameter
    v1: nn.Parameter
    w2: nn.Parameter


class ResidentExperts(nn.Module):
    """Experts as views of the stacked parameters: no weight is copied."""

    def __init__(self, n_experts: int, hidden: int, d_model: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.kernel = FloatGlu(activation)
        self.mlp = ExpertWeights(n_experts, hidden, d_model)

    def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
        """x [n, d_model], expert_ids and router_weights [n, top_k] -> [n, d_model], the weighted sum."""
        return moe_forward(self.kernel, self._fetch, self.n_experts, x, expert_ids, router_weights)

    def _fetch(self, experts: Sequence[int]) -> Iterator[tuple[int, Packed]]:
        w1, v1, w2 = (w.view(self.n_experts, -1, w.shape[1]) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        return ((expert, (w1[expert], v1[expert], w2[expert])) for expert in experts)
