"""Time this program and its peers in turn on the same weights:

python -m tests.bench_peers SPEC.json RUNS.jsonl [ROUNDS]

SPEC.json: {"name": ["command", ...], ...}: each command prints, as its last line, JSON with prefill_tokens_per_s and
decode_tokens_per_s, or what `dbrx bench --json` prints. `{python}` in a command is this Python. The commands run one
after the other, round by round, so that what else the machine does meets all of them. Each run is appended to
RUNS.jsonl as one line, with the rate at which memory was read in that round: an interrupted comparison goes on where it
was, and ROUNDS more come behind those that are there. The table shows medians of all, and ratios of the first to each.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

READ_BYTES = 2**29  # far beyond every cache
KEYS = ("prefill_tokens_per_s", "decode_tokens_per_s")


def figures(command: list[str]) -> dict[str, Any]:
    """What one run says of itself."""
    command = [part.replace("{python}", sys.executable) for part in command]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout
    found = json.loads(out.strip().splitlines()[-1])
    found = found["results"][0] if "results" in found else found
    return {key: found[key] for key in (*KEYS, "load_s") if key in found}


def reading_rate() -> float:
    """Bytes a second of the fastest of eight plain readings of memory with all threads."""
    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        numbers.max()
        seconds.append(time.perf_counter() - start)
    return READ_BYTES / min(seconds)


def main() -> None:
    commands: dict[str, list[str]] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    runs, rounds = Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 3
    for _ in range(rounds):
        rate = reading_rate()
        for name, command in commands.items():
            row = {"when": time.strftime("%Y-%m-%dT%H:%M:%S"), "name": name, "read_gb_s": rate / 1e9} | figures(command)
            print(name, *(f"{row[key]:.1f}" for key in KEYS), file=sys.stderr, flush=True)
            with runs.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(table([json.loads(line) for line in runs.read_text("utf-8").splitlines()]))


def table(rows: list[dict[str, Any]]) -> str:
    """Medians of all runs by name, in the order in which the names first came."""
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_name[row["name"]].append(row)
    medians = {name: [statistics.median(run[key] for run in found) for key in KEYS] for name, found in by_name.items()}
    first = next(iter(medians.values()))
    lines = [
        f"Memory was read with {statistics.median(row['read_gb_s'] for row in rows):.1f} GB/s (median).",
        "",
        "| | runs | prefill, tokens/s | decode, tokens/s | from - to | prefill, first / this | decode, first / this |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (prefill, decode) in medians.items():
        steps = [run[KEYS[1]] for run in by_name[name]]
        lines.append(
            f"| {name} | {len(steps)} | {prefill:.0f} | {decode:.1f} | {min(steps):.1f} to {max(steps):.1f} "
            f"| {first[0] / prefill:.2f} | {first[1] / decode:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
