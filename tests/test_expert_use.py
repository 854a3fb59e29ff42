"""Experts on a card by use: the rule against made-up routing, the plan by hand, and what is kept between processes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dbrx_cli.engine.use import MOST, add_use, keep_use, use_of
from dbrx_cli.planning import Question, advice
from model.config import official
from model.expert_use import Move, least_used, moves
from model.formats import open_weights
from model.load_plan import ARRIVING, LoadOptions, Stored
from model.load_planner import plan_load
from model.machine import parse_devices
from model.placement import PREFILL_CHUNK
from model.speed import Side, Sides, tokens_per_s
from tests.cli import Cli
from tests.test_hybrid import RATES, dbrx, machine_with

LAYERS, EXPERTS, TOP_K, ON_CARD = 40, 16, 4, 5
AWAY = [range(ON_CARD, EXPERTS)] * LAYERS
SOONER, BUS = 1.4e-3, 5e-3  # of DBRX in int4: 124 MB at 80 GB/s beside 900, and over a bus of 25


def routed(likely: np.ndarray, tokens: int, seed: int) -> list[list[int]]:
    """Counts of so many tokens, of which each chose four experts of each layer."""
    keys = np.log(likely) + np.random.default_rng(seed).gumbel(size=(LAYERS, tokens, EXPERTS))
    chosen = keys.argpartition(-TOP_K)[..., -TOP_K:].reshape(LAYERS, -1)
    return [np.bincount(layer, minlength=EXPERTS).tolist() for layer in chosen]


def test_even_routing_moves_next_to_nothing() -> None:
    """Of 16 counts some always differ: of 800 pairs that are compared a handful by chance."""
    even = np.ones(EXPERTS)
    found = [moves(routed(even, tokens, tokens), AWAY, TOP_K, SOONER, 0.0) for tokens in (40, 200, 600, 1000)]
    assert sum(map(len, found)) <= 3


def test_uneven_routing_brings_the_experts_of_most_use_and_then_rests() -> None:
    likely = np.random.default_rng(1).permuted(np.tile(0.8 ** np.arange(EXPERTS), (LAYERS, 1)), axis=1)[:, None]
    counts, away = routed(likely, 2000, 0), [set(each) for each in AWAY]

    def on_card(places: list[set[int]]) -> float:
        return sum(sum(counts[i]) - sum(counts[i][e] for e in places[i]) for i in range(LAYERS)) / sum(map(sum, counts))

    rounds = 0
    while found := moves(counts, away, TOP_K, SOONER, BUS):
        rounds += 1
        assert len(found) <= 25  # a quarter of a second
        for layer, comes, goes in found:
            away[layer] = away[layer] - {comes} | {goes}
    best = [set(least_used(each, EXPERTS - ON_CARD)) for each in counts]
    assert 2 <= rounds <= 10 and on_card(AWAY) < 0.35 < 0.95 * on_card(best) < on_card(away)
    assert len(moves(routed(likely, 2000, 1), away, TOP_K, SOONER, BUS)) <= 2


def test_a_prompt_does_not_lose_by_moves() -> None:
    """Over the rates and lengths of `test_a_prompt_is_never_slower_than_in_one_place`; mostly it gains."""
    likely, takes, size, flops = 0.8 ** np.arange(EXPERTS), [], 198e6 * 0.625, 2 * 198e6
    for length in (9, 64, 512, 2048):
        counts, *_ = routed(likely, length, length)
        for cpu_reads, cpu_computes, card_reads, card_computes, bus in RATES:
            sides = Sides(
                Side(size / cpu_reads, flops / cpu_computes), Side(size / card_reads, flops / card_computes), size / bus
            )
            before, after = (
                sides.split({e: n for e, n in enumerate(counts) if n and e not in here}, [counts[e] for e in here])[1]
                for here in (range(EXPERTS - ON_CARD, EXPERTS), range(ON_CARD))
            )
            takes.append(after / before)
    assert max(takes) < 1.05 and np.median(takes) < 0.85


def test_a_move_must_be_certain_and_pay() -> None:
    counts = [150, *[250] * 14, 400]
    assert moves([counts], [range(8, EXPERTS)], TOP_K, SOONER, BUS) == [Move(0, EXPERTS - 1, 0)]
    assert moves([[each // 50 for each in counts]], [range(8, EXPERTS)], TOP_K, SOONER, BUS) == []
    for slow in ({"bus": 0.05}, {"sooner": 5e-5}, {"sooner": -1.0}):
        assert moves([counts], [range(8, EXPERTS)], TOP_K, **({"sooner": SOONER, "bus": BUS} | slow)) == []
    assert least_used([0] * 4, 3) == (1, 2, 3) and least_used([5, 1, 9, 1], 2) == (1, 3)


def test_a_plan_counts_use() -> None:
    """By hand: four experts take (1000 + 16) / (4 * 1000 + 12 * 250 + 16 * 16) of the choices each."""
    used = [1000 if i in (3, 9, 14, 15) else 250 for i in range(EXPERTS)]
    machine = "24GiB@900GB/s,cpu=192GiB@80GB/s"
    even = dbrx(machine, quantize="int4", offload="auto")
    plan = dbrx(machine, quantize="int4", offload="auto", use=[used] * LAYERS)
    assert [each.on_cpu for each in plan.layers] == [each.on_cpu for each in even.layers]
    assert plan.weights == even.weights
    taken = [(len({3, 9, 14, 15} & {*each.away}), each.on_cpu) for each in plan.layers]
    assert all(hot == max(0, count - 12) for hot, count in taken)
    away = sum(hot * (1000 + 16) + (count - hot) * (250 + 16) for hot, count in taken) / (7000 + 256)
    by_cpu = TOP_K * away * plan.sizes.expert / 80e9
    by_card = (LAYERS * plan.sizes.dense + plan.sizes.head) / 900e9
    assert tokens_per_s(plan) == pytest.approx(1 / (by_cpu + by_card), rel=1e-6)
    assert tokens_per_s(plan) > 1.2 * tokens_per_s(even)
    other = dbrx(machine, quantize="int4", offload="auto", use=[used[:8]] * LAYERS)
    assert replace(other, use=()) == replace(even, use=())
    options = [LoadOptions(quantize="int4", device_map="auto", offload="auto", use=use) for use in ((), plan.use)]
    asked = [Question("dbrx", official(), Stored(), parse_devices(machine), each) for each in options]
    before, after = (next(advice(each)) for each in asked)
    assert "no use was counted yet" in before
    assert after.startswith("22% of the experts lie on the GPU, those of most use: 4")  # some 40 % of the choices


def test_the_largest_context_beside_a_card() -> None:
    """More experts go to the CPU for a longer one, as long as it has room for them."""
    options = LoadOptions(quantize="int4", device_map="auto", offload="auto")
    roomy, full = (
        Question("dbrx", official(), Stored(), parse_devices(f"24GiB,cpu={n}GiB"), options) for n in (192, 66)
    )
    assert roomy.plan.on_cpu and roomy.largest_context == 32768
    longest = full.largest_context
    runs = [replace(full, options=replace(options, context=longest + more)).plan.runs for more in (0, 1)]
    assert 4096 < longest < 32768 and runs == [True, False]


def test_counts_are_kept_for_each_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBRX_DATA", str(tmp_path / "data"))
    one, other = tmp_path / "one", tmp_path / "other"
    assert use_of(one) == ()
    keep_use(one, [[1, 2], [3, 4]])
    add_use(one, [[10, 0], [0, 10]])
    add_use(other, [[5, 6, 7]])
    assert use_of(one) == [[11, 2], [3, 14]] and use_of(other) == [[5, 6, 7]]
    (tmp_path / "link").symlink_to(one)
    assert use_of(tmp_path / "link") == use_of(one)
    keep_use(other, [[3 * MOST, MOST]])
    assert use_of(other) == [[MOST * 3 // 4, MOST // 4]]
    kept = {path for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert len(kept) == 2 and {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    for damaged in ("", "7", "[[1], null]", '{"a": 1}', "[[1"):
        for path in kept:
            path.write_text(damaged)
        assert use_of(one) == ()
    keep_use(one, [[1]])
    for path in kept:
        path.chmod(0o666)
    assert use_of(one) == ()  # others can have written it
    os.chmod(tmp_path / "data" / "experts", 0o777)
    keep_use(one, [[2]])
    assert all(path.read_text() != "[[2]]" for path in kept)


def test_replies_and_traces_count_for_the_next_load(
    cli: Cli, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.load_layout.STREAMED_CHUNK", PREFILL_CHUNK)
    options = LoadOptions(quantize="int8", device_map="auto", offload="auto")
    with open_weights(small_checkpoint) as weights:
        plenty = plan_load(weights.config, Stored.of(weights), machine_with(2**40), options)
    machine = machine_with(2**40 - plenty.free(plenty.machine.gpus[0]) - (24 - ARRIVING) * plenty.sizes.expert)
    monkeypatch.setattr("model.loading.free_memory", lambda gpus: machine)
    monkeypatch.setattr("dbrx_cli.planning.this_machine", lambda experts: machine)
    flags = "-m", small_checkpoint, "--quantize", "int8", "--device-map", "auto", "--offload", "auto"

    assert cli("generate", *flags, "-n", 12, "hello").code == 0
    replied = np.array(use_of(small_checkpoint))
    assert replied.shape == (3, EXPERTS) and 0 < replied.sum() <= 3 * TOP_K * 12
    assert cli("trace", *flags, "--raw", "-n", 12, "hello").code == 0
    # A token a byte, and each of the reply once, though it was made before it was traced.
    assert (np.array(use_of(small_checkpoint)) - replied).sum() == 3 * TOP_K * (5 + 12)
    assert "50% of the experts lie on the GPU, those of most use" in " ".join(cli("plan", *flags).out.split())
