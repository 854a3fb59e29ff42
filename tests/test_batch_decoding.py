"""Many replies at once give what each gives alone, whoever joins and leaves beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from model import DbrxForCausalLM, KVCache, SamplingParams, sampling, scheduler, sequence
from model.errors import InputError, NotFiniteError
from model.lookup import Lookup
from model.outputs import CausalLMOutput
from model.sampling import draw
from model.scheduler import Scheduler
from model.sequence import LogitsMask, common_prefix
from model.sequence import Sequence as Row
from tests import fidelity

torch.set_num_threads(1)

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module", params=["sdpa", "ahead", pytest.param("eager", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Iterator[DbrxForCausalLM]:
    """16 experts choose 4, unevenly. ahead: steps begin before the ids that they read are known, as on a card."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "ahead":
            runs_ahead(patch)
        yield fidelity.load("like_dbrx", "eager" if request.param == "eager" else "sdpa").network


def runs_ahead(patch: pytest.MonkeyPatch) -> None:
    """Let networks on a CPU decode as on a card, where another sampler draws."""
    patch.setattr(DbrxForCausalLM, "runs_ahead", True)
    for module in (sampling, sequence):
        patch.setattr(module, "sample", lambda *given: int(draw(*given)))


def alone(network: DbrxForCausalLM, prompt: list[int], params: SamplingParams, eos: Sequence[int] = ()) -> list[int]:
    """The reply of a plain loop: read, then feed each token."""
    return [*_alone(network, tuple(prompt), params, tuple(eos))]


@lru_cache(maxsize=100)
def _alone(
    network: DbrxForCausalLM, prompt: tuple[int, ...], params: SamplingParams, eos: tuple[int, ...]
) -> list[int]:
    cache, ids, read = KVCache(network.config.n_layers), list[int](), list(prompt)
    generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
    while len(ids) < params.max_tokens and not {*ids[-1:]} & {*eos}:
        with torch.inference_mode():
            logits = network(torch.tensor([read]), past_key_values=cache).logits[0, -1]
        read = [sampling.sample(logits.float(), params, generator)]
        ids += read
    return ids


def run(batch: Scheduler, rows: Sequence[Row], told_before: int = 0) -> None:
    """All rows to their end; what `step` tells is what they hold, but for what they had `told_before`."""
    told: dict[int, list[int]] = {id(row): [] for row in rows}
    for row in rows:
        batch.add(row)
    while len(batch):
        for row, token in batch.step():
            told[id(row)].append(token)
    assert [told[id(row)] for row in rows] == [row.ids[told_before:] for row in rows]
    assert all(row.done for row in rows)


def prompts(network: DbrxForCausalLM, count: int, seed: int = 1) -> list[list[int]]:
    """Of different lengths; every other one begins with the same text."""
    rng, vocab = random.Random(seed), network.config.vocab_size
    shared = [rng.randrange(vocab) for _ in range(9)]
    texts = [[rng.randrange(vocab) for _ in range(rng.choice([1, 2, 7, 20]))] for _ in range(count)]
    return [shared + text if i % 2 else text for i, text in enumerate(texts)]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_each_reply_is_that_of_its_prompt_alone(network: DbrxForCausalLM, size: int) -> None:
    texts = prompts(network, 11)
    rows = [Row(text, replace(GREEDY, max_tokens=1 + i)) for i, text in enumerate(texts)]
    run(Scheduler(network, size), rows)
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        assert row.ids == alone(network, text, replace(GREEDY, max_tokens=1 + i))


def test_rows_end_by_themselves_and_others_take_their_place(network: DbrxForCausalLM) -> None:
    texts = prompts(network, 6)
    eos = [alone(network, texts[0], GREEDY)[3], alone(network, texts[3], GREEDY)[0]]
    rows = [Row(text, GREEDY, eos_ids=eos) for text in texts]
    run(Scheduler(network, 2), rows)
    assert [row.ids for row in rows] == [alone(network, text, GREEDY, eos) for text in texts]
    assert {len(row.ids) for row in rows} > {1, 12} or min(len(row.ids) for row in rows) == 1


def test_what_prompts_have_in_common_is_read_once(network: DbrxForCausalLM) -> None:
    shared = [5, 9, 2, 7, 1, 1, 3, 8]
    texts = [[*shared, i] for i in range(10, 14)]
    rows = [Row(text, GREEDY) for text in [*texts, texts[0]]]
    run(Scheduler(network, 5), rows)
    assert [row.cached_tokens for row in rows] == [0, 8, 8, 8, 8]
    assert rows[0].ids == rows[4].ids == alone(network, texts[0], GREEDY)
    assert [row.ids for row in rows[1:4]] == [alone(network, text, GREEDY) for text in texts[1:]]


def test_a_long_prompt_is_read_while_others_go_on(network: DbrxForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "prefill_chunk", 4)
    first, second = Row([3, 4], GREEDY), Row(list(range(30, 60)), GREEDY)
    batch = Scheduler(network, 2)
    batch.add(first)
    batch.step()
    batch.add(second)
    steps = 0
    while not second.ids:
        batch.step()
        steps += 1
        assert len(first.ids) == 1 + steps
    assert steps == 8
    while len(batch):
        batch.step()
    assert first.ids == alone(network, [3, 4], GREEDY)
    assert second.ids == alone(network, list(range(30, 60)), GREEDY)


def test_long_and_short_prompts_get_on_by_turns(network: DbrxForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones do not wait for a long one that came before, nor the long one for short ones that come and come."""
    monkeypatch.setattr(network, "prefill_chunk", 4)
    rng, vocab = random.Random(4), network.config.vocab_size
    texts = [[rng.randrange(vocab) for _ in range(60)], *([rng.randrange(vocab), i] for i in range(40))]
    long, *short = (Row(text, replace(GREEDY, max_tokens=2)) for text in texts)
    batch, steps, waited = Scheduler(network, 3), 0, list[int]()
    batch.add(long)
    for row in short:
        batch.add(row)
        begun = steps
        while not row.done:
            batch.step()
            steps += 1
        waited.append(steps - begun)
        if long.done:
            break
    assert max(waited) <= 4 and long.done and steps <= 2 * 60 / 2
    for row, text in zip([long, *short[:3]], texts, strict=False):
        assert row.ids == alone(network, text, replace(GREEDY, max_tokens=2))


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding", "done"])
def test_a_row_is_cancelled(network: DbrxForCausalLM, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Wherever it is; it keeps what it has, the others go on, and the place is free."""
    monkeypatch.setattr(network, "prefill_chunk", 4)
    texts = [[3, 4], list(range(30, 60)), [9, 8, 7]]
    rows = [Row(text, GREEDY) for text in texts]
    batch = Scheduler(network, 1 if when == "waiting" else 2)
    for row in rows:
        batch.add(row)
    gone = rows[1]
    for _ in range({"waiting": 2, "reading": 3, "decoding": 14, "done": 30}[when]):
        batch.step()
    made = list(gone.ids)
    assert (0 < len(made) < 12) == (when == "decoding") and gone.done == (when == "done")
    batch.cancel(gone)
    batch.cancel(gone)
    while len(batch):
        assert gone not in [row for row, _ in batch.step()]
    assert gone.ids == made == alone(network, texts[1], GREEDY)[: len(made)]
    assert [row.ids for row in (rows[0], rows[2])] == [alone(network, text, GREEDY) for text in (texts[0], texts[2])]
    assert gone.kv is not None
    if when != "done":
        again = Row(texts[1], GREEDY, reply=made, kv=gone.kv)  # goes on from there
        run(Scheduler(network, 1), [again], told_before=len(made))
        assert again.ids == alone(network, texts[1], GREEDY)
        assert (again.cached_tokens == 0) == (when == "waiting")


def test_same_seed_same_text_whoever_else_is_there(network: DbrxForCausalLM) -> None:
    params = SamplingParams(temperature=1.3, top_p=0.95, max_tokens=10)

    def sampled(prompt: list[int], seed: int) -> Row:
        return Row(prompt, params, generator=torch.Generator().manual_seed(seed))

    mine, other = sampled([4, 2, 6], 7), sampled([4, 2, 6], 8)
    run(Scheduler(network, 6), [*(sampled(text, i) for i, text in enumerate(prompts(network, 5))), mine])
    assert mine.ids == alone(network, [4, 2, 6], replace(params, seed=7))
    run(Scheduler(network, 1), [other])
    assert other.ids != mine.ids


def test_each_row_has_its_own_sampling_mask_and_stopper(network: DbrxForCausalLM) -> None:
    def only_even(row: int, ids: Sequence[int], logits: Tensor) -> Tensor:
        assert row == 0
        return logits.index_fill(0, torch.arange(1, len(logits), 2), -torch.inf)

    rows = [
        Row([1, 2, 3], GREEDY, mask=only_even),
        Row([1, 2, 3], GREEDY, stopper=lambda row, ids: len(ids) == 4),
        Row([1, 2, 3], replace(GREEDY, repetition_penalty=100.0, frequency_penalty=100.0)),
        Row([1, 2, 3], GREEDY),
    ]
    run(Scheduler(network, 4), rows)
    plain = alone(network, [1, 2, 3], GREEDY)
    assert not any(token % 2 for token in rows[0].ids)
    assert rows[1].ids == plain[:4] and rows[3].ids == plain
    assert len(set(rows[2].ids)) == 12 and not set(rows[2].ids) & {1, 2, 3}


def test_a_row_whose_mask_lets_nothing_through_leaves_the_others_alone(network: DbrxForCausalLM) -> None:
    def stuck_after(length: int) -> LogitsMask:
        def mask(row: int, ids: Sequence[int], logits: Tensor) -> Tensor:
            if len(ids) == length:
                raise InputError("stuck")
            return logits

        return mask

    rows = [Row([1, 2, 3], GREEDY, mask=stuck_after(0)), Row([1, 2, 3], GREEDY),
            Row([4, 5], GREEDY, mask=stuck_after(3)), Row([4, 5], GREEDY)]  # fmt: skip
    run(Scheduler(network, 2), rows)
    assert [row.fault is not None for row in rows] == [True, False, True, False]
    assert rows[1].ids == alone(network, [1, 2, 3], GREEDY) and rows[3].ids == alone(network, [4, 5], GREEDY)
    assert rows[0].ids == [] and rows[2].ids == rows[3].ids[:3]


class NeverOdd:
    """Allows all, and lets nothing follow an odd id."""

    def __call__(self, row: int, ids: Sequence[int], logits: Tensor) -> Tensor:
        assert not any(token % 2 for token in ids)
        return logits

    def leads_on(self, row: int, ids: Sequence[int]) -> bool:
        return ids[-1] % 2 == 0


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.5, max_tokens=12)], ids=["greedy", "sampled"])
def test_a_token_that_leads_nowhere_is_taken_back(network: DbrxForCausalLM, params: SamplingParams) -> None:
    def only_even(row: int, ids: Sequence[int], logits: Tensor) -> Tensor:
        return logits.index_fill(0, torch.arange(1, len(logits), 2), -torch.inf)

    rows = [Row([1, 2, 3], params, mask=mask) for mask in (NeverOdd(), only_even)]
    run(Scheduler(network, 2), rows)
    assert len(rows[0].ids) == 12 and not any(token % 2 for token in rows[0].ids)
    if params is GREEDY:
        assert rows[0].ids == rows[1].ids

    class Nothing(NeverOdd):
        def leads_on(self, row: int, ids: Sequence[int]) -> bool:
            return False

    run(Scheduler(network, 2), [nothing := Row([1, 2, 3], params, mask=Nothing())])
    assert nothing.fault is not None and nothing.ids == []


def test_the_context_is_never_left(network: DbrxForCausalLM) -> None:
    row = Row([1, 2, 3], replace(GREEDY, max_tokens=100), max_context=9)
    batch = Scheduler(network, 2)
    run(batch, [row])
    assert len(row.ids) == 6
    for length in (0, 9, 20):
        with pytest.raises(ValueError, match=f"prompt of {length} tokens"):
            batch.add(Row(list(range(length)), GREEDY, max_context=9))


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens when steps run ahead: each step that begins, each time that ids are read."""
    runs_ahead(monkeypatch)
    found, read, forward = list[str](), scheduler.Coming.read, DbrxForCausalLM.forward

    def reads(self: scheduler.Coming) -> list[list[int]]:
        found.append("ids")
        return read(self)

    def begins(self: DbrxForCausalLM, ids: Tensor, **given: Any) -> CausalLMOutput:
        found.append(f"step of {len(ids)}")
        return forward(self, ids, **given)

    monkeypatch.setattr(scheduler.Coming, "read", reads)
    monkeypatch.setattr(DbrxForCausalLM, "forward", begins)
    return found


def test_a_step_begins_before_the_ids_that_it_reads_are_known(order: list[str]) -> None:
    """None begins in vain behind a last token, one does behind an end that nobody could foresee."""
    network = fidelity.load("like_dbrx", "sdpa").network
    rows = [Row(prompt, replace(GREEDY, max_tokens=tokens)) for prompt, tokens in (([4, 5, 6], 4), ([1, 2, 3], 5))]
    run(Scheduler(network, 2), rows)
    assert order == ["step of 2", "step of 2", "ids", "step of 2", "ids", "step of 1", "ids", "ids"]
    assert [row.kv.length for row in rows if row.kv] == [6, 7]
    third = rows[1].ids[2]
    assert third not in rows[1].ids[:2]
    order.clear()
    run(Scheduler(network, 1), [row := Row([1, 2, 3], GREEDY, eos_ids=[third])])
    assert row.ids == rows[1].ids[:3]
    assert order == ["step of 1", "step of 1", "ids", "step of 1", "ids"]


def test_who_has_drafts_is_not_ahead(order: list[str]) -> None:
    """Drafts need the id before them; without any the steps run ahead. The text is the same."""
    network = fidelity.load("like_dbrx", "sdpa").network
    params = replace(GREEDY, max_tokens=40)
    run(Scheduler(network, 1), [plain := Row([1, 2, 3], params)])
    order.clear()
    run(Scheduler(network, 1), [row := Row([1, 2, 3], params, drafter=Lookup(4))])
    assert row.ids == plain.ids
    assert "ids" in order and {*order} - {"step of 1", "ids"}


def test_numbers_that_are_not_finite_end_their_row_alone(order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    network = fidelity.load("like_dbrx", "sdpa").network
    head = network.lm_head.forward

    def poisoned(x: Tensor) -> Tensor:
        logits: Tensor = head(x)
        if order.count("ids") == 2:
            logits[1, :, 5] = torch.nan
        return logits

    monkeypatch.setattr(network.lm_head, "forward", poisoned)
    run(Scheduler(network, 2), rows := [Row([1, 2, 3], GREEDY), Row([4, 5, 6], GREEDY)])
    assert rows[0].fault is None and len(rows[0].ids) == 12
    assert isinstance(rows[1].fault, NotFiniteError) and len(rows[1].ids) == 4


def test_common_prefix() -> None:
    pairs: list[tuple[list[int], list[int]]] = [([], []), ([1], []), ([1, 2], [1, 2, 3]), ([1, 2], [1, 3])]
    assert [common_prefix(*pair) for pair in pairs] == [0, 0, 2, 1]
