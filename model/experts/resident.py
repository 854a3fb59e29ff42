"""Experts whose weights lie in memory as the checkpoint stores them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


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
    """Tokens sorted by expert, one product an expert and matrix, on views: no weight is copied."""

    def __init__(self, n_experts: int, hidden: int, d_model: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.activation = activation
        self.mlp = ExpertWeights(n_experts, hidden, d_model)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [n, d_model], chosen [n, top_k] ids, weights [n, top_k] -> [n, d_model], the weighted sum."""
        top_k = chosen.shape[1]
        w1, v1, w2 = (w.view(self.n_experts, -1, x.shape[1]) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        by_expert = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.n_experts).tolist()
        out = torch.zeros_like(x)
        for expert, pairs in enumerate(torch.split(by_expert, counts)):
            if len(pairs) == 0:
                continue
            tokens = pairs // top_k
            some = x[tokens]
            hidden = self.activation(linear(some, w1[expert])) * linear(some, v1[expert])
            out.index_add_(0, tokens, (hidden @ w2[expert]) * weights.flatten()[pairs, None])
        return out
