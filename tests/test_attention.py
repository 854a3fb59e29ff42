"""Each attention backend against attention written out with plain loops."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from model.attention import AttentionPlan, choose
from model.attention.eager import EagerAttention
from model.attention.flash import FlashAttention
from model.attention.sdpa import SdpaAttention
from model.errors import ModelError
from tests import flash_stand_in

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 10
SCALE = HEAD_DIM**-0.5


def by_hand(q: Tensor, k: Tensor, v: Tensor, sees: int) -> Tensor:
    """One query [heads, head_dim] over the first `sees` keys [kv_len, kv_heads, head_dim], a head at a time."""
    out = torch.empty_like(q)
    for head in range(q.shape[0]):
        kv = head // (q.shape[0] // k.shape[1])
        weights = torch.tensor([math.exp(SCALE * float(q[head] @ k[i, kv])) for i in range(sees)])
        out[head] = (weights / weights.sum()) @ v[:sees, kv]
    return out


BACKENDS = {"eager": EagerAttention(), "sdpa": SdpaAttention(), "flash": FlashAttention(flash_stand_in)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("starts", "mask"),
    [
        pytest.param([0, 0], None, id="prefill"),
        pytest.param([5, 5], None, id="second chunk"),
        pytest.param([3, 7], None, id="ragged rows"),
        pytest.param([0, 0], [[0, 0, 1, 1], [1, 1, 1, 1]], id="left padding"),
        pytest.param([0, 0], [[1, 1, 1, 0], [1, 1, 1, 1]], id="right padding"),
        pytest.param([2, 6], [[0, 1, 0, 1], [1, 1, 1, 0]], id="ragged rows with holes"),
    ],
)
def test_backend_equals_plain_loops(backend: str, starts: list[int], mask: list[list[int]] | None) -> None:
    generator = torch.Generator().manual_seed(1)
    seq = 4
    valid = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    plan = AttentionPlan(starts, seq, valid, CPU)
    q = torch.randn(2, seq, HEADS, HEAD_DIM, generator=generator)
    k, v = (torch.randn(2, plan.kv_len, KV_HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    out = BACKENDS[backend](q, k, v, scale=SCALE, plan=plan)
    assert out.shape == q.shape
    for row in range(2):
        sees = starts[row]
        for column in range(seq):
            if valid is None or valid[row, column]:
                sees += 1
                torch.testing.assert_close(out[row, column], by_hand(q[row, column], k[row], v[row], sees))
        assert sees == plan.lengths[row]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_sees_every_key(backend: str) -> None:
    q = torch.randn(3, 1, HEADS, HEAD_DIM)
    k, v = torch.randn(2, 3, 9, KV_HEADS, HEAD_DIM)
    out = BACKENDS[backend](q, k, v, scale=SCALE, plan=AttentionPlan([8, 8, 8], 1, None, CPU))
    for row in range(3):
        torch.testing.assert_close(out[row, 0], by_hand(q[row, 0], k[row], v[row], 9))


def test_weights_are_those_of_the_output() -> None:
    q = torch.randn(1, 4, HEADS, HEAD_DIM)
    k, v = torch.randn(2, 1, 4, KV_HEADS, HEAD_DIM)
    out, weights = EagerAttention().with_weights(q, k, v, scale=SCALE, plan=AttentionPlan([0], 4, None, CPU))
    assert weights.shape == (1, HEADS, 4, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, HEADS, 4))
    assert not weights.triu(1).any()
    again = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(HEADS // KV_HEADS, 2))
    torch.testing.assert_close(again, out)


def test_auto_takes_what_runs_here() -> None:
    assert choose("auto", CPU, torch.bfloat16)[0] == "sdpa"


def test_flash_without_a_gpu_says_why() -> None:
    with pytest.raises(ModelError, match="needs an NVIDIA GPU") as caught:
        choose("flash_attention_2", CPU, torch.bfloat16)
    assert caught.value.hint and "sdpa" in caught.value.hint


def test_flash_without_the_package_says_how_to_install_it() -> None:
    with pytest.raises(ModelError, match=r"pip install 'dbrx-cli\[flash\]'"):
        choose("flash", torch.device("cuda"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
@pytest.mark.parametrize("starts", [[0, 0], [5, 5], [3, 7]])
def test_real_flash_equals_eager(starts: list[int]) -> None:
    device = torch.device("cuda")
    _, attend = choose("flash", device, torch.bfloat16)
    plan = AttentionPlan(starts, 4, None, device)
    q = torch.randn(2, 4, 12, 128, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, plan.kv_len, 2, 128, device=device, dtype=torch.bfloat16)
    expected = EagerAttention()(q, k, v, scale=128**-0.5, plan=plan)
    torch.testing.assert_close(attend(q, k, v, scale=128**-0.5, plan=plan), expected, atol=2e-2, rtol=2e-2)
