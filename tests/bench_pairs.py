"""Compare an old and a new program in turn until it is clear how they compare:

    python -m tests.bench_pairs SPEC.json RUNS.jsonl [ROUNDS]

SPEC.json: {"name": {"old": ["command", ...], "new": ["command", ...]}, ...}; commands as in bench_peers.py, or with
"turns": N beside them as bench_turns.py: started once for N rounds. A round is old, new, old of one name, or the
reverse: new / old, and beside it old / old, which shows what the machine does by itself. Rounds are made until the
intervals of new / old are narrower than 5 % of it, of prefill and of decoding, or there are ROUNDS of them (40 unless
given). Each is appended to RUNS.jsonl: an interrupted comparison goes on.
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

from tests.bench_peers import KEYS, figures

NARROW, LEVEL = 0.05, 0.95


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Where the median of all rounds lies with 95 % certainty, whatever their distribution; 0 to inf for too few.

    Of n values the median is below the k-th smallest if at least n - k + 1 are above it: the binomial distribution. Of
    six the smallest and the largest enclose it with 1 - 2 / 2^6 = 97 %.
    """
    n, ordered = len(ratios), sorted(ratios)
    outside, k = 2 * 0.5**n, 0
    while outside <= 1 - LEVEL:
        k += 1
        outside += 2 * math.comb(n, k) * 0.5**n
    return (ordered[k - 1], ordered[n - k]) if k else (0.0, float("inf"))


def ratios(rounds: Sequence[dict[str, Any]], which: str, key: str) -> list[float]:
    """which: new, over the old one's mean before and behind it; or again, the old one's second run over its first."""
    if which == "again":
        return [each["again"][key] / each["old"][key] for each in rounds]
    return [each["new"][key] / math.sqrt(each["old"][key] * each["again"][key]) for each in rounds]


def is_clear(rounds: Sequence[dict[str, Any]]) -> bool:
    ends = [interval(ratios(rounds, "new", key)) for key in KEYS]
    return all(high - low < NARROW * low for low, high in ends)


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
                print(
                    name, len(rounds[name]), *(f"{ratios([row], 'new', key)[0]:.3f}" for key in KEYS), file=sys.stderr
                )
    print(table(rounds))


def table(rounds: dict[str, list[dict[str, Any]]]) -> str:
    """Medians of the rates in tokens/s and of the seconds to load, of the ratios, and the ratios' intervals."""
    lines = ["| | rounds | | old | new | new / old | old / old |", "|---|---|---|---|---|---|---|"]
    for name, done in rounds.items():
        for key in (*KEYS, *(["load_s"] if "load_s" in done[0]["old"] else [])):
            old, new = (statistics.median(each[which][key] for each in done) for which in ("old", "new"))
            told = []
            for which in ("new", "again"):
                found = ratios(done, which, key)
                low, high = interval(found)
                told.append(f"{statistics.median(found):.3f} ({low:.3f} to {high:.3f})")
            what = key.removesuffix("_tokens_per_s").removesuffix("_s")
            lines.append(f"| {name} | {len(done)} | {what} | {old:.1f} | {new:.1f} | {told[0]} | {told[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
