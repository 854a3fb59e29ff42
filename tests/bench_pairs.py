"""Compare an old and a new program in turn until it is clear how they compare:

    python -m tests.bench_pairs SPEC.json RUNS.jsonl [ROUNDS]

SPEC.json: {"name": {"old": ["command", ...], "new": ["command", ...]}, ...}; commands as in bench_peers.py, or with
"turns": N beside them as bench_turns.py: started once for N rounds. A round is old, new, old of one name, or the
reverse: new / old, and beside it old / old, which shows what the machine does by itself. Rounds are made until the
intervals of new / old are narrower than 5 % of it, of prefill and of decoding where both tell them, or there are
ROUNDS of them (40 unless given). Each is appended to RUNS.jsonl: an interrupted comparison goes on.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy

from tests.bench_peers import KEYS, figures

NARROW, LEVEL = 0.05, 0.95


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median ratio and where it lies with 95 % certainty; 0 to inf for too few.

    Hodges and Lehmann's estimate: two equal programs give logarithms of ratios that lie alike on both sides of their
    middle, so the median of the means of all pairs (each with itself too) finds it in two thirds of the rounds that a
    median of the ratios needs. Its ends come from Wilcoxon's signed ranks, counted exactly: each of the ranks 1 to n is
    in the sum with 1/2, and the sum is below k with at most 2.5 % (of ten: k = 9).
    """
    logs = numpy.log(numpy.asarray(ratios))
    means = numpy.sort(((logs[:, None] + logs) / 2)[numpy.triu_indices(len(logs))])
    chance = numpy.ones(1)  # of each sum of ranks
    for rank in range(1, len(logs) + 1):
        chance = (numpy.pad(chance, (0, rank)) + numpy.pad(chance, (rank, 0))) / 2
    k = int(numpy.searchsorted(numpy.cumsum(chance), (1 - LEVEL) / 2, side="right"))
    ends = (float(numpy.exp(means[k - 1])), float(numpy.exp(means[-k]))) if k else (0.0, math.inf)
    return float(numpy.exp(numpy.median(means))), *ends


def ratios(rounds: Sequence[dict[str, Any]], which: str, key: str) -> list[float]:
    """which: new, over the old one's mean before and behind it; or again, the old one's second run over its first."""
    if which == "again":
        return [each["again"][key] / each["old"][key] for each in rounds]
    return [each["new"][key] / math.sqrt(each["old"][key] * each["again"][key]) for each in rounds]


def told(rounds: Sequence[dict[str, Any]]) -> list[str]:
    """What both programs tell: behind many tokens bench_turns.py reads no prompt."""
    return [key for key in rounds[0]["old"] if key in rounds[0]["new"]] if rounds else []


def is_clear(rounds: Sequence[dict[str, Any]]) -> bool:
    ends = [interval(ratios(rounds, "new", key)) for key in KEYS if key in told(rounds)]
    return bool(ends) and all(high - low < NARROW * low for _, low, high in ends)


def sitting(name: str, forward: bool, old: list[str], new: list[str], turns: int = 0) -> Iterator[dict[str, Any]]:
    """A round; or `turns` rounds of programs that stay loaded, in turn."""
    commands = {"old": old, "new": new, "again": old}
    order = list(commands)[:: 1 if forward else -1]
    if not turns:
        yield {"name": name} | {which: figures(commands[which]) for which in order}
        return
    with ExitStack() as stack:
        asked = {which: stack.enter_context(Loaded(commands[which])) for which in order}
        for _ in range(turns):
            yield {"name": name} | {which: asked[which].figures() for which in order}
            order.reverse()


class Loaded:
    """A program like bench_turns.py, waiting for its turn."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._load = self._read()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def figures(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._load | self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


def main() -> None:
    spec: dict[str, dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    runs, most = Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 40
    lines = runs.read_text("utf-8").splitlines() if runs.exists() else []
    rounds = {name: [row for row in map(json.loads, lines) if row["name"] == name] for name in spec}
    while unclear := [name for name, done in rounds.items() if len(done) < most and not is_clear(done)]:
        for name in unclear:
            for row in sitting(name, len(rounds[name]) % 2 == 0, **spec[name]):
                rounds[name].append(row)
                with runs.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                found = (f"{key} {ratios([row], 'new', key)[0]:.3f}" for key in told([row]))
                print(name, len(rounds[name]), *found, file=sys.stderr)
    print(table(rounds))


def table(rounds: dict[str, list[dict[str, Any]]]) -> str:
    """Medians of what was told (the seconds to load once a sitting), of the ratios, with intervals."""
    lines = ["| | rounds | | old | new | new / old | old / old |", "|---|---|---|---|---|---|---|"]
    for name, done in rounds.items():
        for key in told(done):
            counted = list({each["old"][key]: each for each in done}.values()) if key == "load_s" else done
            old, new = (statistics.median(each[which][key] for each in counted) for which in ("old", "new"))
            both = []
            for which in ("new", "again"):
                middle, low, high = interval(ratios(counted, which, key))
                both.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
            what = key.removesuffix("_tokens_per_s")
            lines.append(f"| {name} | {len(counted)} | {what} | {old:.1f} | {new:.1f} | {both[0]} | {both[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
