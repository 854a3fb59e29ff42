"""First token after a long conversation against the first token of a fresh prompt with only the new text.

`python -m tests.bench_kv_reuse` prints the figures; `pytest -m bench tests/bench_kv_reuse.py` holds them to the bound.
Measure with nothing else running. Both are timed in turn, so that a machine that slows down slows both.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import pytest

from dbrx_cli.engine import Delta, Done, Request
from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.options import ModelOptions, OutputOptions
from dbrx_cli.report import Report
from model import Message, SamplingParams

TURNS = 30
PAIRS = 7
NEW = "Thank you. And now tell me in one sentence what you would take with you on a journey around the world, and why."


def conversation(turns: int) -> list[Message]:
    """A long talk that costs no decoding: its replies are given."""
    messages: list[Message] = []
    for i in range(turns):
        messages.append(Message("user", f"Question {i}: what is {i} times {i + 3}, and where is such a number used?"))
        messages.append(Message("assistant", f"It is {i * (i + 3)}. " + "It is used to count boxes of apples. " * 3))
    return messages


def first_token(engine: LocalEngine, messages: list[Message]) -> tuple[float, Done]:
    """Seconds to the first token of a reply, and the record of the reply, which has two."""
    start = time.perf_counter()
    stream = engine.stream(Request(messages, SamplingParams(temperature=0, max_tokens=2)))
    assert isinstance(next(stream), Delta)
    seconds = time.perf_counter() - start
    *_, done = stream
    assert isinstance(done, Done)
    return seconds, done


def measure() -> dict[str, float]:
    """Medians in seconds, the median of the paired ratios, and what taking up a saved conversation costs."""
    engine = LocalEngine.load(ModelOptions(model="demo"), Report(OutputOptions()))
    history, new = conversation(TURNS), Message("user", NEW)
    afresh, _ = first_token(engine, history)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        engine.save_cache(path)
        kept: list[float] = []
        fresh: list[float] = []
        loads: list[float] = []
        for _ in range(PAIRS):
            engine._forget()
            seconds, alone = first_token(engine, [new])
            fresh.append(seconds)
            start = time.perf_counter()
            engine.load_cache(path)
            loads.append(time.perf_counter() - start)
            seconds, done = first_token(engine, [*history, new])
            kept.append(seconds)
        size = path.stat().st_size
    return {
        "turns": TURNS,
        "tokens_of_the_conversation": done.usage.prompt_tokens,
        "tokens_read_anew": done.usage.prompt_tokens - done.usage.cached_tokens,
        "tokens_of_the_fresh_prompt": alone.usage.prompt_tokens,
        "first_token_s_conversation_read_whole": afresh,
        "first_token_s_fresh_prompt": statistics.median(fresh),
        "first_token_s_after_conversation": statistics.median(kept),
        "ratio": statistics.median(k / f for k, f in zip(kept, fresh, strict=True)),
        "load_cache_s": statistics.median(loads),
        "cache_file_bytes": size,
    }


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_a_kept_conversation_costs_only_its_new_text() -> None:
    figures = measure()
    assert figures["ratio"] < 1.3, figures


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
