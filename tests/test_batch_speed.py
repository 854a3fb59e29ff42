"""Tokens a second of a batch against one prompt after the other: `pytest -m bench -s tests/test_batch_speed.py`.

DBRX_BENCH_MODEL=FOLDER measures another model than the demo; DBRX_BENCH_FLAGS gives flags such as "--dtype bfloat16".
"""

from __future__ import annotations

import os
import shlex
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from dbrx_cli.engine import Done, Request
from dbrx_cli.engine.batched import answers
from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.options import ModelOptions, OutputOptions
from dbrx_cli.report import Report
from model.messages import Message
from model.sampling import SamplingParams

ROWS, NEW, ROUNDS = 8, 24, 3
TOPICS = ["the sea", "a lost dog", "rain in June", "an old clock", "two friends", "the moon", "bread", "a long road"]


def engine_to_measure() -> LocalEngine:
    flags = dict(zip(*[iter(shlex.split(os.environ.get("DBRX_BENCH_FLAGS", "")))] * 2, strict=True))
    options: dict[str, Any] = {flag.removeprefix("--").replace("-", "_"): value for flag, value in flags.items()}
    model = os.environ.get("DBRX_BENCH_MODEL", "demo")
    return LocalEngine.load(ModelOptions(model=model, **options), Report(OutputOptions(quiet=True)))


@pytest.mark.bench
@pytest.mark.timeout(600)
@pytest.mark.parametrize("temperature", [0, 0.7], ids=["greedy", "sampled"])
def test_a_batch_of_eight_makes_more_tokens_a_second(temperature: float) -> None:
    """The whole work, prompts included; the two ways in turn, so that what else the machine does hits both."""
    engine, params = engine_to_measure(), SamplingParams(temperature=temperature, max_tokens=NEW, seed=1)
    requests = [Request([Message("user", f"Write a story about {topic}.")], params) for topic in TOPICS]

    def one_by_one() -> int:
        done = [list(engine.stream(request))[-1] for request in requests]
        return sum(len(each.token_ids) for each in done if isinstance(each, Done))

    def together() -> int:
        done = [result for _, result in answers(engine, enumerate(requests), ROWS)]
        return sum(len(each.token_ids) for each in done if isinstance(each, Done))

    def rate(way: Callable[[], int]) -> float:
        engine.pool.clear()
        start = time.perf_counter()
        tokens = way()
        return tokens / (time.perf_counter() - start)

    list(answers(engine, enumerate(requests[:1]), 1))  # pages are read, kernels are made
    pairs = [(rate(one_by_one), rate(together)) for _ in range(ROUNDS)]
    alone, batch = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    how = f"{engine.name}, {str(engine.network.dtype)[6:]}, {'greedy' if params.greedy else 'sampled'}"
    print(f"\n{how}: one by one {alone:.1f} tokens/s, {ROWS} at a time {batch:.1f}, ratio {ratio:.2f}")
    assert ratio >= 2.5 or engine.name != "demo"
