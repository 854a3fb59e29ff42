"""The network against transformers 4.57.6, the reference that agrees with Databricks' own code."""

from __future__ import annotations

import pytest
import torch

from tests import fidelity

torch.set_num_threads(1)

NAMES = list(fidelity.GOLDEN)
# Among the quick tests is each model with the usual backend, and each backend with DBRX's shape.
each_model_and_backend = pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=() if backend == "sdpa" or name == "like_dbrx" else pytest.mark.slow)
        for name in NAMES
        for backend in fidelity.BACKENDS
    ],
)
each_model = pytest.mark.parametrize("name", NAMES)


def test_enough_kinds_of_configuration() -> None:
    configs = [facts["config"] for facts in fidelity.GOLDEN.values()]
    attn, ffn = [c["attn_config"] for c in configs], [c["ffn_config"] for c in configs]
    assert len(configs) >= 6
    assert {a["rope_theta"] for a in attn} == {10000, 500000}
    assert {f["moe_normalize_expert_weights"] for f in ffn} == {1, 2, None}
    assert None in {a["clip_qkv"] for a in attn} and len({a["clip_qkv"] for a in attn}) > 2
    assert {1, 2, 6} <= {c["n_heads"] // c["attn_config"]["kv_n_heads"] for c in configs}
    assert 1 in {a["kv_n_heads"] for a in attn} and 1 in {f["moe_top_k"] for f in ffn}
    assert any(f["moe_top_k"] == f["moe_num_experts"] for f in ffn)
    for config in configs:
        clip = config["attn_config"]["clip_qkv"]
        sizes = [config[key] for key in ("d_model", "n_heads", "n_layers", "vocab_size")]
        sizes += [config["ffn_config"]["ffn_hidden_size"], config["d_model"] // config["n_heads"]]
        assert len(set(sizes)) == len(sizes), (sizes, clip)


@each_model_and_backend
def test_logits(name: str, backend: str) -> None:
    for way, difference in fidelity.logits(fidelity.load(name, backend)).items():
        assert difference < 1e-4, way


@pytest.mark.slow
@each_model
def test_internals_and_losses(name: str) -> None:
    case = fidelity.load(name)
    for what, difference in (fidelity.internals(case) | fidelity.losses(case)).items():
        assert difference < 1e-4, what


@each_model_and_backend
def test_greedy_tokens(name: str, backend: str) -> None:
    found = fidelity.greedy(fidelity.load(name, backend))
    assert found["greedy tokens"] == 40 and found["cached decode"] < 1e-4


@each_model_and_backend
def test_bfloat16_is_within_its_rounding(name: str, backend: str) -> None:
    """Not further from the float32 reference than the reference's own bfloat16, but for chance."""
    figures = fidelity.bfloat16(name, backend)
    assert figures["mean"] < 1.25 * figures["their mean"]
    assert figures["max"] < 2 * figures["their max"]
