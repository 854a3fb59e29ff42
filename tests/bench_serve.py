"""Time servers in turn with the same clients: total tokens a second, and how long the first token takes.

python -m tests.bench_serve SPEC.json [ROUNDS] [CLIENTS] [REPLY_TOKENS]
python -m tests.bench_serve --turns URL [TURNS] [SECONDS]

SPEC.json: {"name": ["command", ...], ...}: each command serves OpenAI's protocol at 127.0.0.1:PORT, which stands for
`{port}` in its words (`{python}` for this Python). CLIENTS (8) ask for REPLY_TOKENS (128) behind prompts of 32 words
that no two have in common, greedily, streamed. A name that ends with `:1` is measured with one client.

--turns: a conversation of so many turns (30) at a running server; each turn's first token against that of a fresh
prompt which has only the new text. SECONDS (0): how long the user thinks before each.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2

from dbrx_cli.addresses import listen

WORDS = "river stone cloud light garden winter house letter music summer paper window bridge forest silver".split()
START_SECONDS = 600


def ask(client: httpx2.Client, path: str, body: dict[str, Any]) -> tuple[float, int, str]:
    """Seconds to the first text, tokens (as the server counts them), and the text."""
    begun, first, tokens, text = time.perf_counter(), 0.0, 0, ""
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    with client.stream("POST", path, json=body | options) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            told = json.loads(line.removeprefix("data: "))
            for choice in told.get("choices") or ():
                piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                first = first or (time.perf_counter() - begun if piece else 0.0)
                text += piece
            tokens = (told.get("usage") or {}).get("completion_tokens", tokens)
    return first or time.perf_counter() - begun, tokens, text


def prompt(number: int) -> str:
    rng = random.Random(number)
    return " ".join(rng.choice(WORDS) for _ in range(32))


def measure(url: str, clients: int, tokens: int, number: int) -> dict[str, float]:
    """One round: all clients at once."""
    with httpx2.Client(base_url=url, timeout=600, trust_env=False) as client:
        model = client.get("models").json()["data"][0]["id"]
        # Some servers end at the end-of-text id, others are told not to: `ignore_eos` is known to those that would.
        bodies = [
            {"model": model, "prompt": prompt(1000 * number + i), "max_tokens": tokens, "ignore_eos": True}
            for i in range(clients)
        ]
        begun = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            told = list(pool.map(lambda body: ask(client, "completions", body), bodies))
        seconds = time.perf_counter() - begun
    firsts = sorted(first for first, _, _ in told)
    made = sum(count for _, count, _ in told)
    p95 = firsts[min(len(firsts) - 1, round(0.95 * len(firsts)))]
    return {"tokens": made, "tokens_per_s": made / seconds, "p50_s": statistics.median(firsts), "p95_s": p95}


def started(command: list[str], port: int) -> subprocess.Popen[bytes]:
    words = [word.replace("{python}", sys.executable).replace("{port}", str(port)) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"{words[0]} ended with code {process.returncode}")
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                return process
        except httpx2.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"{words[0]} does not answer")


def compare(spec: dict[str, list[str]], rounds: int, clients: int, tokens: int) -> None:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in spec}
    for number in range(rounds):
        for name, command in spec.items():
            with listen("127.0.0.1", 0) as free:
                port = free.getsockname()[1]
            process = started(command, port)
            try:
                url, count = f"http://127.0.0.1:{port}/v1", 1 if name.endswith(":1") else clients
                measure(url, count, 8, 999)  # warm
                found[name].append(measure(url, count, tokens, number))
                print(name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
            finally:
                process.terminate()
                process.wait()
    print("| server | tokens | tokens/s | first token p50 | p95 |\n|---|---|---|---|---|")
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"| {name} | {middle['tokens']:.0f} | {middle['tokens_per_s']:.1f} | {middle['p50_s']:.3f} s |"
            f" {middle['p95_s']:.3f} s |"
        )


def turns(url: str, count: int, seconds: float) -> None:
    """Each turn of one conversation, and beside it a fresh prompt of its new text only."""
    talk: list[dict[str, str]] = []
    ratios = []
    with httpx2.Client(base_url=url, timeout=600, trust_env=False) as client:
        for number in range(count):
            talk.append({"role": "user", "content": prompt(number)})
            time.sleep(seconds)
            first, _, text = ask(client, "chat/completions", {"messages": talk, "max_tokens": 32})
            fresh = [{"role": "user", "content": prompt(10_000 + number)}]
            time.sleep(seconds)
            alone, _, _ = ask(client, "chat/completions", {"messages": fresh, "max_tokens": 8})
            talk.append({"role": "assistant", "content": text})
            ratios.append(first / alone)
            print(f"turn {number + 1}: {first:.3f} s, fresh {alone:.3f} s, {first / alone:.2f} x", flush=True)
    print(f"median of all but the first {statistics.median(ratios[1:]):.2f} x, of the last ten "
          f"{statistics.median(ratios[-10:]):.2f} x")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "--turns":
        turns(sys.argv[2], int((sys.argv[3:4] or [30])[0]), float((sys.argv[4:5] or [0])[0]))
    else:
        numbers = [int(word) for word in sys.argv[2:]]
        compare(json.loads(Path(sys.argv[1]).read_text()), *(numbers + [3, 8, 128][len(numbers) :]))
