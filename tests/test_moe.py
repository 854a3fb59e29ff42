"""Router and experts against dense formulas that use every expert for every token."""

from __future__ import annotations

import pytest
import torch

from model.config import DbrxFFNConfig
from model.experts import ResidentExperts
from model.moe import DbrxRouter, load_balancing_loss

EXPERTS, HIDDEN, WIDTH = 16, 12, 20


@pytest.mark.parametrize("top_k", [1, 4, 16])
@pytest.mark.parametrize("tokens", [1, 33])
def test_experts_equal_a_dense_einsum(top_k: int, tokens: int) -> None:
    torch.manual_seed(0)
    experts = ResidentExperts(EXPERTS, HIDDEN, WIDTH, torch.nn.functional.silu)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.5)
    x = torch.randn(tokens, WIDTH)
    scores = torch.randn(tokens, EXPERTS) + torch.linspace(-2, 2, EXPERTS)  # uneven: some experts get no token
    weights, chosen = scores.softmax(-1).topk(top_k)
    w1, v1, w2 = (getattr(experts.mlp, name).view(EXPERTS, HIDDEN, WIDTH) for name in ("w1", "v1", "w2"))
    hidden = torch.nn.functional.silu(torch.einsum("nd,ehd->neh", x, w1)) * torch.einsum("nd,ehd->neh", x, v1)
    every = torch.einsum("neh,ehd->ned", hidden, w2)
    dense = torch.zeros(tokens, EXPERTS).scatter(1, chosen, weights)
    expected = torch.einsum("ned,ne->nd", every, dense)
    torch.testing.assert_close(experts(x, chosen, weights), expected, atol=1e-4, rtol=1e-4)


def test_experts_copy_no_weight() -> None:
    experts = ResidentExperts(EXPERTS, HIDDEN, WIDTH, torch.nn.functional.silu)
    shared = torch.zeros(EXPERTS * HIDDEN, WIDTH)
    experts.load_state_dict({f"mlp.{name}": shared for name in ("w1", "v1", "w2")}, assign=True)
    assert experts.mlp.w1.data_ptr() == shared.data_ptr()


@pytest.mark.parametrize("p", [1.0, 2.0, None])
def test_chosen_weights_are_divided_by_their_norm(p: float | None) -> None:
    torch.manual_seed(0)
    config = DbrxFFNConfig(moe_num_experts=EXPERTS, moe_top_k=4, moe_normalize_expert_weights=p)
    router = DbrxRouter(config, WIDTH)
    probabilities, weights, chosen = router(torch.randn(7, WIDTH))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(7))
    picked = probabilities.gather(1, chosen)
    assert (picked.min(-1).values[:, None] >= probabilities.scatter(1, chosen, 0.0)).all()
    norm = torch.ones(7, 1) if p is None else (picked**p).sum(-1, keepdim=True) ** (1 / p)
    torch.testing.assert_close(weights, picked / norm)


def test_router_softmax_is_in_float32() -> None:
    router = DbrxRouter(DbrxFFNConfig(moe_num_experts=EXPERTS, moe_top_k=4), WIDTH).to(torch.bfloat16)
    x = torch.randn(50, WIDTH, dtype=torch.bfloat16)
    exact = router.layer(x).float().softmax(-1)
    probabilities, weights, _ = router(x)
    assert probabilities.dtype == weights.dtype == torch.bfloat16
    assert torch.equal(probabilities, exact.to(torch.bfloat16))


def test_balanced_routing_has_the_least_loss() -> None:
    even = torch.full((32, EXPERTS), 1 / EXPERTS) + torch.eye(EXPERTS).repeat(2, 1) * 1e-3
    uneven = torch.zeros(32, EXPERTS).index_fill(1, torch.tensor([3]), 1.0)
    assert float(load_balancing_loss([even], 1, None)) == pytest.approx(1.001, abs=1e-4)
    assert float(load_balancing_loss([uneven], 1, None)) == pytest.approx(EXPERTS)
    mask = torch.ones(2, 16)
    assert float(load_balancing_loss([even, even], 1, mask)) == pytest.approx(1.001, abs=1e-4)
