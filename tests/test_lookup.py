"""Prompt lookup: drafts against a plain search, text with drafts against text without, chance against its law."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dbrx_cli.options import SamplingOptions
from model import KVCache, SamplingParams
from model.attention import AttentionPlan
from model.errors import InputError
from model.kv_cache import KVRow
from model.lookup import LONGEST, SHORTEST, AutoLookup, Lookup
from model.prefill import prefill
from model.scheduler import Scheduler
from model.sequence import Drafter
from model.sequence import Sequence as Row
from tests import fidelity
from tests.decoding import one_by_one

torch.set_num_threads(1)


def searched(ids: Sequence[int], most: int) -> list[int]:
    """The draft by its definition: the last earlier place of the longest tail that has one, and on from there."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(ids) - 1, n - 1, -1):
            if list(ids[end - n : end]) == list(ids[-n:]):
                text = list(ids)
                for i in range(most):
                    text.append(text[end + i])
                return text[len(ids) :]
    return []


def test_drafts_are_what_a_search_finds() -> None:
    rng = random.Random(5)
    found = 0
    for _ in range(60):
        lookup, ids = Lookup(6), [rng.randrange(4) for _ in range(rng.randrange(12))]
        for _ in range(12):
            most = rng.randrange(8)
            draft = lookup.draft(ids, most)
            assert draft == searched(ids, min(most, 6))
            found += bool(draft)
            ids += [rng.randrange(4) for _ in range(rng.randrange(1, 4))]
    assert found > 200


def run_auto(right: Callable[[int], int], cost: Callable[[int], float], steps: int) -> tuple[AutoLookup, float, int]:
    """Let a text that always matches be made: how many of a draft are right, what a step takes -> seconds, ids."""
    lookup, seconds, ids = AutoLookup(), 0.0, [1, 2] * 4
    start = len(ids)
    for step in range(steps):
        draft = lookup.draft(ids, 100)
        accepted = min(right(step), len(draft))
        took = cost(len(draft))
        lookup.learn(len(draft), accepted, took)
        seconds += took
        ids += ([1, 2] * 8)[: accepted + 1] if len(ids) % 2 == 0 else ([2, 1] * 8)[: accepted + 1]
    return lookup, seconds, len(ids) - start


def test_auto_goes_on_where_it_pays_and_stops_where_it_does_not() -> None:
    def cost(drafted: int) -> float:
        return 0.1 * (1.8 if drafted else 1.0)

    lookup, seconds, made = run_auto(lambda _: 5, cost, 200)
    assert lookup.drafted > 1900 and made / seconds > 3 / 0.1
    lookup, seconds, made = run_auto(lambda _: 0, cost, 600)
    assert made == 600 and seconds < 1.02 * 600 * 0.1 and 0 < lookup.drafted < 120
    # A text that begins to repeat itself is noticed.
    lookup, seconds, made = run_auto(lambda step: 0 if step < 300 else 8, cost, 900)
    assert made > 2500 and made / seconds > 2 / 0.1


@pytest.fixture(scope="module")
def case() -> fidelity.Case:
    """The smallest, in float32: each text is made by ids of one step and of several."""
    return fidelity.load("one_kv_head", "sdpa")


class Oracle:
    """Drafts what is known to come, with a wrong id at every `wrong`-th place."""

    def __init__(self, text: Sequence[int], wrong: int, most: int = 5) -> None:
        self.text, self.wrong, self.most = list(text), wrong, most
        self.steps: list[tuple[int, int]] = []

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        start = len(ids)
        ahead = enumerate(self.text[start : start + min(most, self.most)], start)
        return [abs(token - (place % self.wrong == 0)) for place, token in ahead]

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        assert seconds > 0
        self.steps.append((drafted, accepted))


def run(case: fidelity.Case, drafter: Drafter | None, prompt: Sequence[int], **options: Any) -> list[int]:
    """Decode one row; after each id the cache must agree with what is known."""
    keywords = {key: options.pop(key) for key in ("mask", "stopper", "max_context", "eos_ids") if key in options}
    params = SamplingParams(**{"temperature": 0, "max_tokens": 40} | options)
    row = Row(prompt, params, drafter=drafter, generator=torch.Generator().manual_seed(3), **keywords)
    reply: list[int] = []
    for token in one_by_one(case.network, row):
        reply.append(token)
        known = [*prompt, *reply]
        # What was read of the known ids is really theirs: reading them afresh gives the same keys.
        if len(reply) in (3, 8):
            fresh = KVCache(case.network.config.n_layers)
            prefill(case.network, torch.tensor([known]), fresh)
            assert row.kv is not None
            count = min(row.kv.length, len(known))
            assert count >= len(known) - 1 and row.kv.length <= len(row.known)
            for layer in range(case.network.config.n_layers):
                for mine, theirs in zip(row.kv.read(layer, 0, count), fresh.rows[0].read(layer, 0, count), strict=True):
                    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    return reply


def only_even(row: int, ids: Sequence[int], logits: Tensor) -> Tensor:
    return logits.index_fill(0, torch.arange(1, len(logits), 2), -torch.inf)


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.95},
    "hot": {"temperature": 3.0, "top_k": 40},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "mask": {"mask": only_even},
    "context": {"max_context": 45},
    "stopper": {"stopper": lambda row, ids: len(ids) == 11},
    "one": {"max_tokens": 1},
}


@pytest.fixture(scope="module")
def without_drafts(case: fidelity.Case) -> Callable[[str], list[int]]:
    """The reply of one of CASES, made once."""
    return cache(lambda name: run(case, None, case.data["greedy_prompt"].tolist(), **CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [1, 3, 10**6], ids=["never-right", "sometimes", "always"])
@pytest.mark.parametrize("name", CASES)
def test_drafts_change_no_text(
    case: fidelity.Case, without_drafts: Callable[[str], list[int]], name: str, wrong: int
) -> None:
    """Greedy or with a seed, whatever ends the reply, and whether the drafts are right or not."""
    prompt, expected = case.data["greedy_prompt"].tolist(), without_drafts(name)
    oracle = Oracle([*prompt, *expected], wrong)
    assert run(case, oracle, prompt, **CASES[name]) == expected
    made = 1 + sum(1 + accepted for _, accepted in oracle.steps)
    assert made == len(expected) or (made == len(expected) + 1 and oracle.steps[-1][1] > 0)  # it ended on a draft
    if wrong == 1:
        assert not any(accepted for _, accepted in oracle.steps)
    if wrong == 10**6 and len(expected) > 20:
        assert len(oracle.steps) <= 1 + len(expected) // 5


def test_a_draft_ends_with_the_reply(case: fidelity.Case) -> None:
    """No id is drafted that could not be used: not beyond max_tokens, not beyond the context."""
    prompt = case.data["greedy_prompt"].tolist()
    text = [*prompt, *run(case, None, prompt)]
    oracle = Oracle(text, 10**6)
    run(case, oracle, prompt, max_tokens=9)
    assert oracle.steps == [(5, 5), (1, 1)]
    oracle = Oracle(text, 10**6)
    run(case, oracle, prompt, eos_ids=[text[len(prompt) + 3]])
    assert oracle.steps[-1][1] <= 5


@pytest.mark.parametrize("most", [1, 4, 16])
def test_greedy_text_is_the_same_with_real_lookups(case: fidelity.Case, most: int) -> None:
    rng = random.Random(2)
    phrase = [rng.randrange(case.network.config.vocab_size) for _ in range(9)]
    prompt = phrase * 4 + phrase[:3]
    lookup = Lookup(most)
    assert run(case, lookup, prompt, max_tokens=60) == run(case, None, prompt, max_tokens=60)
    assert lookup.drafted > lookup.accepted > 0


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9}], ids=["greedy", "sampled"])
def test_each_row_of_a_batch_has_its_drafts(case: fidelity.Case, params: dict[str, Any]) -> None:
    """Texts that end at different places, with drafts that are right, sometimes right, and none."""
    prompt = case.data["greedy_prompt"].tolist()
    prompts = [prompt, prompt[3:], prompt[::-1], prompt[2:9], [5]]
    options = [params | {"max_tokens": 9 + 5 * i} for i in range(len(prompts))]
    expected = [run(case, None, each, **option) for each, option in zip(prompts, options, strict=True)]
    wrongs = [10**6, 3, None, 1, 4]
    drafters = [
        Oracle([*each, *text], wrong) if wrong else None
        for each, text, wrong in zip(prompts, expected, wrongs, strict=True)
    ]
    rows = [
        Row(
            each,
            SamplingParams(**{"temperature": 0} | option),
            drafter=drafter,
            generator=torch.Generator().manual_seed(3),
        )
        for each, option, drafter in zip(prompts, options, drafters, strict=True)
    ]
    scheduler = Scheduler(case.network, len(rows))
    for row in rows:
        scheduler.add(row)
    told: dict[Row, list[int]] = {row: [] for row in rows}
    while len(scheduler):
        for row, token in scheduler.step():
            told[row].append(token)
    assert [told[row] for row in rows] == [row.ids for row in rows] == expected
    assert all(sum(right for _, right in drafter.steps) for drafter in (drafters[0], drafters[1]) if drafter)


class Table:
    """Stands in for a network: the next id depends on the last one alone, by a table of logits [vocab, vocab]."""

    runs_ahead = False

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.config = SimpleNamespace(max_seq_len=100, n_layers=1)
        self.device = torch.device("cpu")
        self.calls = 0

    def place_by_use(self) -> None:
        pass

    def __call__(self, ids: Tensor, past_key_values: KVCache) -> SimpleNamespace:
        self.calls += 1
        past_key_values.advance(AttentionPlan(past_key_values.lengths, ids.shape[1], None, self.device))
        return SimpleNamespace(logits=self.logits[ids])


class Fixed:
    """Always drafts the same ids."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        return self.ids[:most]

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("draws", [500, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("options", "draft"),
    [({}, [2, 0]), ({"temperature": 0.6}, [1, 1]), ({"top_k": 2}, [0, 2]), ({"top_p": 0.8, "min_p": 0.1}, [2, 2])],
    ids=["plain", "cold", "top-k", "top-p"],
)
def test_sampled_texts_have_the_same_distribution(options: dict[str, Any], draft: list[int], draws: int) -> None:
    """Pearson's chi-square over all texts of three ids; the expected numbers come from the table by arithmetic."""
    logits = torch.tensor([[1.2, -0.3, 0.4], [0.1, 0.9, -1.0], [-0.5, 0.3, 1.5]])
    neutral: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
    params = SamplingParams(**neutral | options, max_tokens=3)
    expected = [by_definition(row, **{"top_k": 0, "min_p": 0.0} | neutral | options) for row in logits.tolist()]
    network: Any = Table(logits)
    generator = torch.Generator().manual_seed(17)
    counts = dict.fromkeys(itertools.product(range(3), repeat=3), 0)
    for _ in range(draws):
        (kv := KVRow(1)).length = 1
        row = Row([1], params, kv=kv, logits=logits[1], drafter=Fixed(draft), generator=generator)
        a, b, c = one_by_one(network, row)
        counts[a, b, c] += 1
    assert network.calls < 1.95 * draws  # drafts were taken
    chi_square = 0.0
    for (a, b, c), count in counts.items():
        mean = draws * expected[1][a] * expected[a][b] * expected[b][c]
        assert count == 0 or mean > 0
        chi_square += (count - mean) ** 2 / mean if mean else 0
    assert chi_square < 64.6  # 1 in 10,000 for 26 degrees of freedom; fewer degrees are stricter


def by_definition(logits: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    weights = torch.tensor(logits, dtype=torch.float64).div(temperature).softmax(0).tolist()
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if mass < top_p * total and weights[i] >= min_p * weights[order[0]]:
            kept.append(i)
        mass += weights[i]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def test_the_flag_is_checked() -> None:
    def parsed(text: str) -> int | str:
        return SamplingOptions(lookup=text).over(SamplingParams()).lookup

    assert [parsed(text) for text in ("auto", "off", "0", "12")] == ["auto", 0, 0, 12]
    for text in ("", "-1", "65", "x", "1.5", "9" * 5000):
        with pytest.raises(InputError, match="lookup"):
            parsed(text)
