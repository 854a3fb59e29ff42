"""Ctrl-C while a reply is made: within a second, in every way of making one; what came is kept."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from tests.cli import SOON
from tests.forks import Forks

pytestmark = pytest.mark.slow  # whole runs and sessions

LONG = " ".join(f"{i} and {i * 7}," for i in range(80))
MODES = ("plain", "lookup", "resume", "prompt-cache", "logprobs")


def flags_of(mode: str, folder: Path) -> list[str]:
    return {
        "plain": [],
        "lookup": ["--lookup", "8"],
        "resume": ["--resume", str(folder / "state")],
        "prompt-cache": ["--prompt-cache", str(folder / "cache")],
        "logprobs": ["--logprobs", "20"],
    }[mode]


@pytest.mark.parametrize("mode", MODES)
def test_a_reply_stops_soon(forks: Forks, tiny_checkpoint: Path, tmp_path: Path, mode: str) -> None:
    """Once, early; with time to spare for other tests that run beside it."""
    _interrupt(forks, tiny_checkpoint, tmp_path, mode, count=1, latest=0.3, limit=SOON)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
def test_a_reply_stops_within_a_second(forks: Forks, checkpoint: Path, tmp_path: Path, mode: str) -> None:
    _interrupt(forks, checkpoint, tmp_path, mode, count=8, latest=1.5, limit=1.0)


def _interrupt(
    forks: Forks, checkpoint: Path, tmp_path: Path, mode: str, count: int, latest: float, limit: float
) -> None:
    """At a random moment since the model is loaded, at the `latest` in so many seconds: in the long prompt or reply."""
    rng = random.Random(MODES.index(mode))
    command = (
        "generate",
        "-m",
        checkpoint,
        "--raw",
        "-n",
        "400",
        "-t",
        "0.9",
        "--jsonl",
        *flags_of(mode, tmp_path),
        LONG,
    )
    for _ in range(count):
        run = forks.start(*command)
        while b"start" not in run.out:
            time.sleep(0.01)
        run.signal_after(rng.uniform(0, latest), signal.SIGINT)
        asked = time.monotonic()
        code = run.wait()
        seconds = time.monotonic() - asked
        events = [json.loads(line) for line in run.out.splitlines()]
        if events[-1].get("finish_reason") == "length":  # it was quicker than the signal
            continue
        assert code == 130 and seconds < limit, (code, seconds)
        assert run.err == ""
        # Nothing was under way before the first token of the prompt was read; from then on there is a record.
        assert len(events) == 1 or events[-1]["finish_reason"] == "interrupted"
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {"state", "cache"}
        (tmp_path / "state").unlink(missing_ok=True)
