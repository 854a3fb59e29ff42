"""The sampler against transformers' processors (data/sampler_golden), the definitions, and frequencies."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dbrx_cli.options import SamplingOptions
from model import DbrxForCausalLM
from model.sampling import DISTRIBUTION, PARAMETERS, SamplingParams, allowed, candidates, draw, penalize, sample

torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"
CASES: list[dict[str, Any]] = json.loads((DATA / "sampler_golden.json").read_text("utf-8"))["cases"]
NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "sampler_golden.safetensors")


def case_name(case: dict[str, Any]) -> str:
    return "-".join([case["logits"], *(f"{name}={value}" for name, value in case["params"].items())])


@pytest.fixture(params=["cpu", "card"])
def device(request: pytest.FixtureRequest) -> str:
    """Whose sampler; a card's computes on a CPU, too."""
    return str(request.param)


def filtered_logits(logits: Tensor, params: SamplingParams, device: str) -> Tensor:
    """As transformers gives them: all, with -inf where a token may not come."""
    if device == "card":
        return allowed(logits, params)
    ids, kept = candidates(logits, params)
    assert bool((ids.diff() > 0).all())
    return torch.full(logits.shape, -math.inf).index_copy(0, ids, kept)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case_name(case) for case in CASES])
def test_agrees_with_transformers(golden: dict[str, Tensor], index: int, device: str) -> None:
    case = CASES[index]
    params = SamplingParams(**NEUTRAL | case["params"])
    logits = golden[f"logits.{case['logits']}"]
    seen = golden.get(f"seen.{index}", torch.ones(len(logits), dtype=torch.bool))

    penalized = penalize(logits, seen, torch.zeros(len(logits), dtype=torch.long), params)
    torch.testing.assert_close(penalized, golden.get(f"penalized.{index}", logits))

    filtered, expected = filtered_logits(penalized, params, device), golden[f"filtered.{index}"]
    if case["top_p_cuts_a_tie"]:  # which of the equal tokens stays is an accident of sorting
        filtered, expected = filtered.sort().values, expected.sort().values
    torch.testing.assert_close(filtered, expected)


def test_the_golden_data_reaches_every_edge() -> None:
    assert any(case["top_p_cuts_a_tie"] for case in CASES)
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        assert sum(name in case["params"] for case in CASES) >= 20


def test_top_p_keeps_the_token_that_crosses(device: str) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((1e-300, 1), (0.4, 1), (0.6, 2), (0.85, 3), (0.97, 4)):
        filtered = filtered_logits(logits, SamplingParams(**NEUTRAL | {"top_p": top_p}), device)
        assert filtered.isfinite().tolist() == [i < kept for i in range(4)]


@pytest.mark.parametrize("top_p", [1e-300, 0.3, 0.95, 0.999, 1 - 2**-20])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 20.0])
def test_top_p_sorts_few_and_keeps_what_sorting_all_keeps(top_p: float, spread: float, device: str) -> None:
    """With a real vocabulary, flat (all tokens tie) to peaked."""
    logits = spread * torch.randn(100_352, generator=torch.Generator().manual_seed(2))
    found = filtered_logits(logits, SamplingParams(**NEUTRAL | {"top_p": top_p}), device)
    ids = (found > -math.inf).nonzero()[:, 0]
    ordered, order = logits.double().sort(descending=True, stable=True)
    mass = ordered.softmax(-1).cumsum(-1)
    count = int((mass - ordered.softmax(-1) < top_p).sum())
    assert abs(mass[len(ids) - 1] - mass[max(count, 1) - 1]) < 1e-5  # probabilities of float32
    assert torch.equal(ids, order[: len(ids)].sort().values) and torch.equal(found[ids], logits[ids])


def test_filters_leave_the_given_logits_alone() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    params = SamplingParams(
        top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=1.5, frequency_penalty=1, presence_penalty=1
    )
    for way in (candidates, allowed):
        way(penalize(logits, logits > 0, torch.ones(50), params), params)
    assert torch.equal(logits, before)


def test_penalties_follow_their_definitions() -> None:
    params = SamplingParams(repetition_penalty=1.25, frequency_penalty=0.4, presence_penalty=-0.3)
    logits = [2.0, -1.0, 0.0, 3.0, -2.0, 1.0]
    seen = [True, True, True, False, True, True]  # the second is in the prompt alone
    counts = [3, 0, 1, 0, 2, 1]
    expected = []
    for logit, was_seen, count in zip(logits, seen, counts, strict=True):
        if was_seen:
            logit = logit / 1.25 if logit > 0 else logit * 1.25
        expected.append(logit - 0.4 * count - (-0.3 if count else 0))
    result = penalize(torch.tensor(logits), torch.tensor(seen), torch.tensor(counts), params)
    torch.testing.assert_close(result, torch.tensor(expected))


def test_neutral_penalties_change_nothing() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(penalize(logits, logits > -9, torch.full((20,), 5), SamplingParams()), logits)


def test_greedy_takes_the_largest_logit() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0)
    assert params.greedy and not SamplingParams().greedy
    assert {int(one(logits, params)) for one in (sample, draw)} == {int(logits.argmax())}


def draws(logits: Tensor, params: SamplingParams, count: int, seed: int, device: str) -> list[int]:
    generator, one = torch.Generator().manual_seed(seed), draw if device == "card" else sample
    return [int(one(logits, params, generator)) for _ in range(count)]


def test_one_seed_gives_one_sequence(device: str) -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=1)
    assert draws(logits, params, 50, 3, device) == draws(logits, params, 50, 3, device)
    assert draws(logits, params, 50, 3, device) != draws(logits, params, 50, 4, device)


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"temperature": 2.0, "top_k": 6}, {"top_p": 0.9, "min_p": 0.05}],
    ids=["plain", "cold", "hot-top-k", "top-p-min-p"],
)
def test_frequencies_are_the_distribution(options: dict[str, Any], count: int, device: str) -> None:
    """Pearson's chi-square; the expected numbers come from plain arithmetic, not from the sampler."""
    logits = [1.5, 0.2, -0.5, 2.1, 0.0, 1.1, -1.5, 0.7, 1.9, -0.1]
    params = SamplingParams(**NEUTRAL | options)
    expected = probabilities(logits, **NEUTRAL | options)
    drawn = draws(torch.tensor(logits), params, count, 11, device)
    observed = [drawn.count(token) for token in range(10)]
    assert all(seen == 0 for seen, p in zip(observed, expected, strict=True) if p == 0)
    chosen = [(seen, count * p) for seen, p in zip(observed, expected, strict=True) if p > 0]
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in chosen)
    assert len(chosen) >= 5
    assert chi_square < 33.7  # 1 in 10,000 for nine degrees of freedom; fewer degrees are stricter


def probabilities(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The distribution by its definition, one token after another."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: -weights[token])[: top_k or None]
    total, mass, nucleus = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        if mass < top_p * total:
            nucleus.append(token)
        mass += weights[token]
    nucleus = [token for token in nucleus if weights[token] >= min_p * weights[ranked[0]]]
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(logits))]


def test_a_token_that_is_cut_is_never_drawn(device: str) -> None:
    """With a real vocabulary nearly every probability is exactly zero."""
    logits = torch.full((100_352,), -math.inf)
    logits[[5, 70_000]] = torch.tensor([0.0, 1.0])
    assert set(draws(logits, SamplingParams(temperature=1), 50, 0, device)) == {5, 70_000}


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams) if field.name != "seed"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_params_must_be_finite(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("temperature", [-0.1], [0, 2.5]),
        ("top_p", [0, -0.5, 1.01], [1e-6, 1]),
        ("top_k", [-1], [0, 1]),
        ("min_p", [-0.1, 1.1], [0, 1]),
        ("repetition_penalty", [0, -1], [0.5, 2]),
        ("max_tokens", [0, -5], [1]),
        ("frequency_penalty", [], [-2, 2]),
        ("presence_penalty", [], [-2, 2]),
    ],
)
def test_params_are_checked(name: str, wrong: list[Any], right: list[Any]) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value})
    for value in right:
        assert getattr(SamplingParams(**{name: value}), name) == value


def test_every_parameter_has_a_flag_and_an_argument(tiny_checkpoint: Path) -> None:
    assert {field.name for field in fields(SamplingOptions)} == {*PARAMETERS, "stop"}
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint)
    given: dict[str, Any] = {name: 1 if PARAMETERS[name] is int else 0.25 for name in DISTRIBUTION}
    assert network.generate(torch.tensor([[5]]), max_new_tokens=1, do_sample=True, seed=1, **given).shape == (1, 2)
