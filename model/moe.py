"""The mixture of experts: a router chooses, the experts compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import DbrxConfig, DbrxFFNConfig
from .experts import ResidentExperts
from .kernels import ACTIVATIONS


class DbrxRouter(nn.Module):
    """Scores every expert for every token and takes the best `moe_top_k`."""

    def __init__(self, config: DbrxFFNConfig, d_model: int) -> None:
        super().__init__()
        self.top_k = config.moe_top_k
        self.norm = config.moe_normalize_expert_weights
        self.layer = nn.Linear(d_model, config.moe_num_experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, d_model] -> probabilities [n, experts], router_weights [n, top_k], expert_ids [n, top_k].

        Softmax and norm are in float32, as Databricks defines them; what is returned is in the dtype of x.
        """
        probabilities = self.layer(x).softmax(dim=-1, dtype=torch.float32)
        router_weights, expert_ids = probabilities.topk(self.top_k, dim=-1)
        if self.norm is not None:
            router_weights = router_weights / router_weights.norm(p=self.norm, dim=-1, keepdim=True)
        return probabilities.to(x.dtype), router_weights.to(x.dtype), expert_ids


class DbrxFFN(nn.Module):
    """Router and experts of one block."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        ffn = config.ffn_config
        self.router = DbrxRouter(ffn, config.d_model)
        self.experts: nn.Module = ResidentExperts(
            ffn.moe_num_experts,
            ffn.ffn_hidden_size,
            config.d_model,
            ACTIVATIONS[str(ffn.activation)],
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, seq, d_model] -> the same shape, and router probabilities [batch * seq, experts]."""
        flat = x.flatten(0, 1)
        probabilities, router_weights, expert_ids = self.router(flat)
        return self.experts(flat, expert_ids, router_weights).view_as(x), probabilities


def load_balancing_loss(router_probabilities: Sequence[Tensor], top_k: int, mask: Tensor | None) -> Tensor:
    """How unevenly the experts are used (Switch Transformer, arXiv 2101.03961, equations 4 to 6), over all layers.

    router_probabilities: a tensor [batch * seq, experts] a layer; mask [batch, seq]: 0 leaves a token out.
    """
    device = router_probabilities[0].device
    probabilities = torch.cat([p.to(device) for p in router_probabilities])
    n_experts = probabilities.shape[-1]
    chosen = functional.one_hot(probabilities.topk(top_k, dim=-1).indices, n_experts).float()
    if mask is None:
        weights = probabilities.new_full((len(probabilities), 1), 1 / len(probabilities))
    else:
        weights = mask.to(device, probabilities.dtype).flatten().repeat(len(router_probabilities))[:, None]
        weights = weights / weights.sum()
    share_of_tokens = (chosen * weights[..., None]).sum(0)  # [top_k, experts]
    mean_probability = (probabilities * weights).sum(0)  # [experts]
    return n_experts * (share_of_tokens * mean_probability).sum()
