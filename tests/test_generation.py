"""Decoding: cached against recomputed, batches against single rows, stopping, penalties, faults."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import DbrxForCausalLM, KVCache, SamplingParams
from model.errors import ContextError, ModelError
from model.generation_config import GenerationConfig
from model.prefill import prefill
from model.sampling import candidates
from model.sequence import Sequence as Row
from tests import fidelity
from tests.decoding import one_by_one, reply

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def case() -> fidelity.Case:
    """16 experts choose 4, unevenly."""
    return fidelity.load("like_dbrx", "sdpa")


def recomputed(network: DbrxForCausalLM, prompt: Sequence[int], new: int) -> list[int]:
    """Greedy tokens without any cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_routing_is_uneven(case: fidelity.Case) -> None:
    for counts in case.facts["tokens_of_each_expert"]:
        assert len(counts) == 16 and max(counts) > 5 * min(counts)


def test_cached_decoding_equals_recomputing(case: fidelity.Case) -> None:
    prompt = case.data["greedy_prompt"].tolist()
    out = case.network.generate(torch.tensor([prompt]), max_new_tokens=15, do_sample=False)
    assert out[0, len(prompt) :].tolist() == recomputed(case.network, prompt, 15)


def test_a_left_padded_batch_gives_what_each_row_gives(case: fidelity.Case) -> None:
    ids, mask = case.data["batch_left_ids"], case.data["batch_left_mask"]
    together = case.network.generate(ids, mask, max_new_tokens=12, do_sample=False)
    assert together.shape == (3, ids.shape[1] + 12)
    for row in range(3):
        alone = ids[row][mask[row].bool()]
        single = case.network.generate(alone[None], max_new_tokens=12, do_sample=False)
        assert torch.equal(together[row, ids.shape[1] :], single[0, len(alone) :])


BASE = [5, 0, 7, 9, 0, 0, 3, 11, 20, 31, 2, 8]


@pytest.mark.parametrize(
    ("ids", "options", "expected"),
    [
        (BASE, {}, [45, 205, 188, 75, 81, 194]),
        ([0, 0, *BASE], {}, [45, 205, 188, 75, 81, 194]),
        ([*BASE[2:], 0], {}, [23, 141, 186, 172, 31, 196]),
        (BASE, {"eos_token_id": 0}, [135, 89, 1, 82, 141, 20]),  # padding that ends a reply, too: all are tokens
    ],
)
def test_without_a_mask_ids_of_padding_are_not_read(
    case: fidelity.Case, ids: list[int], options: dict[str, Any], expected: list[int]
) -> None:
    """The tokens are those of transformers 4.57.6: generate(ids, pad_token_id=0, do_sample=False)."""
    new = case.network.generate(torch.tensor([ids]), max_new_tokens=6, pad_token_id=0, **options)[0, len(ids) :]
    assert new.tolist() == expected


@pytest.mark.parametrize("beyond", [-1, 10**6])
def test_ids_that_the_network_has_not_are_named(case: fidelity.Case, beyond: int) -> None:
    with pytest.raises(ValueError, match="ids that are none of the network's"):
        case.network.generate(torch.tensor([[1, beyond]]))


def test_a_kept_cache_goes_on_where_it_stopped(case: fidelity.Case) -> None:
    prompt = case.data["input_ids"][None, :40]
    expected = case.network.generate(prompt, max_new_tokens=10, do_sample=False)
    cache = KVCache(case.network.config.n_layers)
    prefill(case.network, prompt[:, :25], cache)
    again = case.network.generate(prompt, max_new_tokens=10, do_sample=False, past_key_values=cache)
    assert torch.equal(again, expected)


def test_a_padded_batch_goes_on_with_its_cache(case: fidelity.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several lengths, with padding that is wider than a chunk; then a plain forward goes on, too."""
    network, ids = case.network, case.data["input_ids"].tolist()
    prompts, width = [ids[:30], ids[30:37], ids[40:51]], 30
    monkeypatch.setattr(network, "prefill_chunk", 4)
    batch, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width)
    for row, prompt in enumerate(prompts):
        batch[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    cache = KVCache(network.config.n_layers, 3)
    for _ in range(2):
        batch = network.generate(batch, mask, max_new_tokens=3, do_sample=False, past_key_values=cache)
        mask = torch.cat((mask, torch.ones(3, 3)), dim=1)
    for row, prompt in enumerate(prompts):
        assert batch[row, width:].tolist() == recomputed(network, prompt, 6)
    with torch.no_grad():
        behind = network(batch[:, -1:], past_key_values=cache).logits[:, -1].argmax(-1)
    assert behind.tolist() == [recomputed(network, prompt, 7)[-1] for prompt in prompts]


@pytest.mark.parametrize("mask", [torch.ones(1, 11), torch.ones(2, 12), torch.ones(12), torch.arange(12)[None] < 9])
def test_a_mask_of_another_shape_or_with_padding_behind_is_refused(case: fidelity.Case, mask: Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask"):
        case.network.generate(case.data["greedy_prompt"][None], mask, max_new_tokens=2)


def test_forward_with_past_key_values_as_in_transformers(case: fidelity.Case) -> None:
    ids = case.data["input_ids"][None, :20]
    with torch.no_grad():
        whole = case.network(ids).logits[:, -1]
        first = case.network(ids[:, :12])
        mask = torch.ones(1, 20)
        second = case.network(ids[:, 12:], mask, past_key_values=first.past_key_values, logits_to_keep=1)
    assert second.logits is not None and second.logits.shape[1] == 1
    torch.testing.assert_close(second.logits[:, -1], whole, atol=1e-4, rtol=0)


def test_rows_end_at_any_eos_and_are_padded(case: fidelity.Case) -> None:
    prompt = case.data["greedy_prompt"].repeat(2, 1)
    greedy = case.data["greedy_ids"].tolist()
    prompt[1, 0] = (prompt[1, 0] + 1) % case.network.config.vocab_size
    other = case.network.generate(prompt[1:], max_new_tokens=8, do_sample=False)[0, 12:].tolist()
    eos = next(t for t in greedy[2:8] if t not in greedy[:2] and t not in other)
    out = case.network.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=[eos, 10**6], pad_token_id=1)
    end = greedy.index(eos)
    assert out[0, 12:].tolist() == greedy[: end + 1] + [1] * (8 - end - 1)
    assert out[1, 12:].tolist() == other


def test_stopping_and_lengths(case: fidelity.Case) -> None:
    prompt = case.data["greedy_prompt"][None]
    seen: list[tuple[int, int]] = []

    def stop(row: int, ids: Sequence[int]) -> bool:
        seen.append((row, len(ids)))
        return len(ids) == 3

    assert case.network.generate(prompt, max_new_tokens=9, do_sample=False, stopping=stop).shape[1] == 12 + 3
    assert seen == [(0, 1), (0, 2), (0, 3)]
    assert case.network.generate(prompt, max_length=30, do_sample=False).shape[1] == 30
    for given in ({"max_length": 12}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} .* leaves no room"):
            case.network.generate(prompt, **given)
    with pytest.raises(TypeError, match="num_beams"):
        case.network.generate(prompt, num_beams=3)


def test_the_context_is_never_exceeded(case: fidelity.Case) -> None:
    room = case.network.config.max_seq_len
    prompt = torch.arange(room - 3)[None] % case.network.config.vocab_size
    assert case.network.generate(prompt, max_new_tokens=50, do_sample=False).shape[1] == room
    with pytest.raises(ContextError, match=f"{room} tokens"):
        case.network.generate(torch.zeros(1, room, dtype=torch.long))


def test_same_seed_same_tokens_other_seed_others(case: fidelity.Case) -> None:
    prompt = case.data["greedy_prompt"][None]
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    first, again, other = (case.network.generate(prompt, seed=seed, **options) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_checkpoints_defaults_are_taken(case: fidelity.Case) -> None:
    network = fidelity.load("like_dbrx", "sdpa").network
    eos = int(case.data["greedy_ids"][4])
    network.generation_config = GenerationConfig(eos_token_id=(eos,), do_sample=False)
    end = case.data["greedy_ids"].tolist().index(eos) + 1
    assert network.generate(case.data["greedy_prompt"][None]).shape[1] == 12 + end


def read(folder: Path, values: dict[str, Any] | None, config: dict[str, Any] | None = None) -> GenerationConfig:
    if values is not None:
        (folder / "generation_config.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return GenerationConfig.from_folder(folder)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"do_sample": True, "temperature": 1e-6}, {"temperature": 0}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 1e-300}, {"temperature": 0}),
        ({"temperature": 0.001, "top_k": 0}, {"temperature": 0.001, "top_k": 0}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 50.0, "max_new_tokens": 256.0}, {"top_k": 50, "max_tokens": 256}),
        ({"top_p": 1, "min_p": 0, "repetition_penalty": 1}, {"top_p": 1, "min_p": 0, "repetition_penalty": 1}),
        ({"top_p": 1.5}, {"top_p": 1}),
        (dict.fromkeys(("temperature", "top_p", "top_k", "do_sample", "max_new_tokens")), {}),
        ({"max_length": 20, "num_beams": 1, "cache_implementation": "static"}, {}),
    ],
)
def test_odd_values_mean_what_transformers_makes_of_them(
    values: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    found = read(tmp_path, values)
    assert found.sampling().under() == SamplingParams(**expected) and not found.faults
    again = read(tmp_path, found.to_dict())
    assert again.sampling() == found.sampling() and again.to_dict().get("temperature", 1) > 0


def test_what_would_act_and_is_not_applied_is_named_once(tmp_path: Path) -> None:
    idle = {"no_repeat_ngram_size": 0, "num_beams": 1, "typical_p": 1.0, "suppress_tokens": None, "bad_words_ids": []}
    read(tmp_path, idle | {"forced_eos_token_id": None, "epsilon_cutoff": 0.0, "remove_invalid_values": False})
    acting = {"no_repeat_ngram_size": 2, "num_beams": 4, "suppress_tokens": [1], "forced_eos_token_id": 0}
    with pytest.warns(UserWarning) as told:
        read(tmp_path, idle | acting)
    keys = ", ".join(sorted(acting))
    path = tmp_path / "generation_config.json"
    assert [str(each.message) for each in told] == [f"{path}: ignoring unsupported keys {keys}"]


def test_top_p_of_zero_leaves_the_likeliest_token(tmp_path: Path) -> None:
    params = read(tmp_path, {"do_sample": True, "top_p": 0.0}).sampling()
    ids, _ = candidates(torch.tensor([0.0, 0.1, 0.05]), params)
    assert ids.tolist() == [1] and params.temperature == 0.7


@pytest.mark.parametrize(
    ("key", "value", "given", "message"),
    [
        ("top_k", 1.5, {"top_k": 3}, "must be a whole number, not 1.5"),
        ("top_k", True, {"top_k": 3}, "must be a number, not True"),
        ("top_k", -5, {"temperature": 0}, "must be 0 or above, not -5"),
        ("temperature", math.nan, {"temperature": 0}, "must be 0, or 0.001-100, not nan"),
        ("temperature", "0.7", {"temperature": 0.7}, "must be a number, not '0.7'"),
        ("temperature", -1, {"temperature": 0.7}, "must be 0, or"),
        ("top_p", [0.9], {"top_p": 1}, "must be a number"),
        ("top_p", -0.1, {"temperature": 0}, "must be above 0"),
        ("min_p", 2, {"min_p": 0}, "must be from 0 to 1"),
        ("repetition_penalty", 0, {"repetition_penalty": 1}, "must be from 0.01"),
        ("max_new_tokens", 0, {"max_tokens": 4}, "must be 1 or above"),
        ("do_sample", "yes", {"temperature": 0.5}, "must be true or false"),
        ("temperature", "x" * 10**6, {"temperature": 1}, "must be a number"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_unless_another_is_given(
    key: str, value: Any, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    defaults = read(tmp_path, {key: value, "eos_token_id": 5}).sampling()
    assert getattr(defaults.under(**given), next(iter(given))) == next(iter(given.values()))
    others = {"top_k": {"repetition_penalty": 1.1}}.get(key, {"top_k": 4})
    with pytest.raises(ModelError) as caught:
        defaults.under(**others)
    assert caught.value.message.startswith(f"{tmp_path / 'generation_config.json'}: {key} {message}")
    assert caught.value.hint and " or give --" in caught.value.hint and len(caught.value.one_line) < 400


@pytest.mark.parametrize(
    ("generation", "config", "eos", "pad"),
    [
        (None, {"eos_token_id": 7}, (7,), None),
        ({}, {"eos_token_id": [7, 8], "pad_token_id": 0}, (7, 8), 0),
        ({"eos_token_id": None}, {"eos_token_id": 7}, (7,), None),
        ({"eos_token_id": []}, {"eos_token_id": 7}, (7,), None),
        ({"eos_token_id": [9]}, {"eos_token_id": 7, "pad_token_id": 3}, (9,), 3),
        ({"eos_token_id": 9.0, "pad_token_id": -1}, {}, (9,), None),
        ({"eos_token_id": -1}, {"eos_token_id": None}, (), None),
    ],
)
def test_ends_of_a_reply_are_found_where_transformers_reads_them(
    generation: dict[str, Any] | None, config: dict[str, Any], eos: tuple[int, ...], pad: int | None, tmp_path: Path
) -> None:
    found = read(tmp_path, generation, config)
    assert (found.eos_token_id, found.pad_token_id) == (eos, pad)


@pytest.mark.parametrize("value", ["7", True, 7.5, [[7]], {"a": 1}, [7, None], 2**63, [7, 10**400]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ids_that_are_none_are_refused(value: Any, file: str, tmp_path: Path) -> None:
    both: list[dict[str, Any]] = [{}, {"eos_token_id": value}]
    with pytest.raises(ModelError, match=rf"{file}: eos_token_id .* whole numbers"):
        read(tmp_path, *(both if file == "config.json" else both[::-1]))


def test_repetition_penalty_forbids_what_was_said(case: fidelity.Case) -> None:
    """A penalty without bound leaves only tokens that are neither in the prompt nor in the reply."""
    prompt = case.data["greedy_prompt"].tolist()
    out = case.network.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, repetition_penalty=100.0, frequency_penalty=100.0
    )[0].tolist()
    reply = out[len(prompt) :]
    assert len(set(reply)) == len(reply)


def test_a_mask_decides_what_may_come(case: fidelity.Case) -> None:
    def only_even(row: int, ids: Sequence[int], logits: Tensor) -> Tensor:
        return logits.index_fill(0, torch.arange(1, len(logits), 2), -torch.inf)

    out = case.network.generate(
        case.data["greedy_prompt"][None], max_new_tokens=10, do_sample=False, logits_mask=only_even
    )
    assert not (out[0, 12:] % 2).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_a_clear_error(bad: float) -> None:
    network = fidelity.load("like_dbrx", "sdpa").network
    network.lm_head.weight.data[7, 3] = bad
    with pytest.raises(ModelError, match="not finite"):
        network.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)


def test_an_interrupted_step_leaves_no_trace(case: fidelity.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = case.data["greedy_prompt"].tolist()
    row = Row(prompt, SamplingParams(temperature=0, max_tokens=40))
    steps = one_by_one(case.network, row)
    tokens = [next(steps) for _ in range(3)]

    last = case.network.transformer.blocks[-1]
    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    assert row.kv is not None and row.kv.length == len(prompt) + 2  # the third token was chosen, but not read
    with torch.inference_mode():
        again = case.network(torch.tensor([[tokens[-1]]]), past_key_values=KVCache.of([row.kv])).logits[0, -1]
    assert int(again.argmax()) == case.data["greedy_ids"][3]


@pytest.mark.parametrize("said", [1, 4, 9])
def test_a_reply_is_taken_up_where_it_stopped(case: fidelity.Case, said: int) -> None:
    """Penalties count what was said, the limit includes it, and the generator goes on from its state."""
    prompt = case.data["greedy_prompt"].tolist()
    params = SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5, max_tokens=12)
    generator = torch.Generator().manual_seed(2)
    whole: list[int] = []
    state = generator.get_state()
    for token in one_by_one(case.network, Row(prompt, params, generator=generator)):
        whole.append(token)
        state = generator.get_state() if len(whole) == said else state

    other = torch.Generator()
    other.set_state(state)
    first = whole[:said]
    assert first + reply(case.network, prompt, params, reply=first, generator=other) == whole


def test_a_reply_that_is_whole_gets_no_more(case: fidelity.Case) -> None:
    prompt, said = case.data["greedy_prompt"].tolist(), [3, 4, 5]
    for options in ({"eos_ids": [5]}, {"stopper": lambda row, ids: len(ids) == 3}, {"max_context": len(prompt) + 3}):
        assert reply(case.network, prompt, SamplingParams(), reply=said, **options) == []
