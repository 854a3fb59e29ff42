"""Time this program and its peers in turn on the same weights: python -m tests.bench_peers SPEC.json [ROUNDS]

SPEC.json: {"name": ["command", ...], ...}: each command prints, as its last line, JSON with prefill_tokens_per_s and
decode_tokens_per_s, or what `dbrx bench --json` prints. The commands run one after the other, round by round, so that
what else the machine does meets all of them; the table shows medians, and ratios to the first command.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path


def figures(command: list[str]) -> tuple[float, float]:
    """Prefill and decode in tokens a second of one run."""
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    found = json.loads(out.strip().splitlines()[-1])
    found = found["results"][0] if "results" in found else found
    return found["prefill_tokens_per_s"], found["decode_tokens_per_s"]


def main() -> None:
    commands: dict[str, list[str]] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            runs[name].append(figures(command))
            print(name, *(f"{rate:.1f}" for rate in runs[name][-1]), file=sys.stderr, flush=True)
    medians = {name: [statistics.median(rates) for rates in zip(*found, strict=True)] for name, found in runs.items()}
    first = next(iter(medians.values()))
    print("| | prefill, tokens/s | decode, tokens/s | prefill, first / this | decode, first / this |")
    print("|---|---|---|---|---|")
    for name, (prefill, decode) in medians.items():
        print(f"| {name} | {prefill:.0f} | {decode:.1f} | {first[0] / prefill:.2f} | {first[1] / decode:.2f} |")


if __name__ == "__main__":
    main()
