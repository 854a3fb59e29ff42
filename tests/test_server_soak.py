"""A thousand requests of sixteen clients, some of which hang up, err or dawdle: nothing is lost, nothing stays."""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dbrx_cli.server.service import Limits
from tests.served import Served, until
from tests.test_server import GREEDY, choice, engine_of, reply
from tests.test_server_life import sent

CLIENTS, DISCONNECTS, MALFORMED, SLOW = 16, 0.20, 0.05, 0.02
PROMPTS = [f"{'word ' * (11 * i % 60)}number {i}" for i in range(24)]
MALFORMATIONS: list[dict[str, Any]] = [{"max_tokens": -1}, {"prompt": None}, {"model": "x"}, {"logit_bias": {"x": 1}}]


def body_of(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": tokens_of(i), "temperature": 0}


def tokens_of(i: int) -> int:
    return 4 + i % (20 if i >= 100 else 4)  # the short form is to cost little


def ask(served: Served, i: int, rng: random.Random) -> tuple[str, int, str]:
    """What kind of request it was; its number, and the text that came."""
    drawn = rng.random()
    if drawn < DISCONNECTS:
        with sent(served, body_of(i) | {"max_tokens": 300, "stream": rng.random() < 0.5}):
            time.sleep(rng.random() * 0.05)
        return "hung up", i, ""
    if drawn < DISCONNECTS + MALFORMED:
        answer = served.post("completions", **(body_of(i) | rng.choice(MALFORMATIONS)))
        assert answer.status_code in (400, 404), answer.text
        return "malformed", i, ""
    if drawn < DISCONNECTS + MALFORMED + SLOW:
        with sent(served, body_of(i) | {"stream": True}, receive_bytes=1024) as slow:
            return "slow", i, dripping(slow)
    if i % 2:
        events = list(served.stream("completions", **body_of(i)))
        assert events[-1] == "[DONE]"
        return "finished", i, "".join(choice(event)["text"] for event in events if isinstance(event, dict))
    answer = served.post("completions", **body_of(i))
    assert answer.status_code == 200, answer.text
    return "finished", i, str(choice(answer.json())["text"])


def dripping(slow: socket.socket) -> str:
    content = b""
    while not content.endswith(b"0\r\n\r\n"):
        content += slow.recv(64)
        time.sleep(0.002)
    lines = [line for line in content.decode().splitlines() if line.startswith("data: {")]
    return "".join(choice(json.loads(line.removeprefix("data: ")))["text"] for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_nothing_is_lost_and_nothing_stays(small_checkpoint: Path, count: int) -> None:
    process, rng = psutil.Process(), random.Random(7)
    alone, engine = engine_of(small_checkpoint), engine_of(small_checkpoint)
    wanted = {(i % len(PROMPTS), tokens_of(i)) for i in range(count)}
    texts = {
        (p, n): reply(alone, PROMPTS[p], replace(GREEDY, max_tokens=n), chat=False).text for p, n in sorted(wanted)
    }
    threads, files = threading.active_count(), process.num_fds()
    memory: list[int] = []
    with Served(lambda: engine, Limits(rows=8, queue=CLIENTS)) as served:
        with ThreadPoolExecutor(CLIENTS) as clients:
            asked = [clients.submit(ask, served, i, random.Random(rng.random())) for i in range(count)]
            kinds = Counter[str]()
            for i, one in enumerate(asked):
                kind, number, text = one.result()
                kinds[kind] += 1
                if kind in ("finished", "slow"):
                    assert text == texts[number % len(PROMPTS), tokens_of(number)], (kind, number)
                if i % 50 == 0:
                    gc.collect()  # what stays counts, not when the collector comes round
                    memory.append(process.memory_info().rss)
        until(lambda: not served.service.open and not served.service.worker.running)
        assert served.service.worker.waiting == 0 and sum(kinds.values()) == count
    until(lambda: threading.active_count() <= threads and process.num_fds() <= files)
    if count >= 1000:
        warm = memory[4]  # behind the first 200
        print(dict(kinds), "bytes after 200 and at most then:", warm, max(memory[4:]), "cpus", os.cpu_count())
        assert max(memory[4:]) <= 1.02 * warm
