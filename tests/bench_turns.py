"""Rates of a loaded network, asked again and again, for bench_pairs.py: run in the checkout to measure:

    python .../bench_turns.py MODEL QUANTIZE [BEHIND]

Loads, prints {"load_s": ...}, then for each line of stdin reads a prompt, makes tokens and prints JSON as
bench_peers.py reads it. Two programs that take turns of seconds meet the same state of the machine, which two runs of
theirs do not.

With BEHIND it makes tokens behind that many others, of which only the first are read: the speed does not depend on
what the cache holds, and to read 32,768 takes ten minutes. Beside the rate stands the one at which attention read keys
and values, from the time that a token takes longer than behind a short prompt.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

sys.path.insert(0, "")  # the checkout, not this file's folder

import torch
from torch import Tensor

from model import DbrxForCausalLM
from model.attention import AttentionPlan
from model.kv_cache import KVCache

PROMPT, SHORT, NEW = 256, 8, 16
READ, STEPS = 512, 32  # with BEHIND
LEAST_S = 1e-6  # that attention takes longer, whatever else the machine did
MOST_OFF = 0.05  # of the norm of logits: steps that quantize their activations differ by rounding

Rates = dict[str, float]


def tokens_per_s(network: DbrxForCausalLM, prompt: int, new: int, counted: int) -> float:
    ids = random_ids(prompt)
    start = time.perf_counter()
    out = network.generate(ids, max_new_tokens=new, do_sample=False)
    assert out.shape[1] == prompt + new
    return counted / (time.perf_counter() - start)


def random_ids(count: int) -> Tensor:
    return torch.randint(10, 1000, (1, count), generator=torch.Generator().manual_seed(0))


def from_the_front(network: DbrxForCausalLM) -> Callable[[], Rates]:
    """Reading a prompt, and decoding behind a short one."""
    tokens_per_s(network, PROMPT, 2, PROMPT)  # pages are read, threads are started
    return lambda: {
        "prefill_tokens_per_s": tokens_per_s(network, PROMPT, 1, PROMPT),
        "decode_tokens_per_s": tokens_per_s(network, SHORT, NEW, NEW),
    }


class Recorder(KVCache):
    """A cache that also keeps what the last step appended, and its plan."""

    plan: AttentionPlan

    def __init__(self, n_layers: int) -> None:
        super().__init__(n_layers)
        self.appended: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        self.appended[layer] = k, v
        return super().append(layer, k, v, plan)

    def advance(self, plan: AttentionPlan) -> None:
        self.plan = plan
        super().advance(plan)


def behind_many(network: DbrxForCausalLM, tokens: int) -> Callable[[], Rates]:
    """Decoding behind so many tokens, and how fast attention read them."""
    few, many = filled(network, READ), filled(network, tokens)
    nbytes = (tokens - READ) * sum(part[:, 0].nbytes for pair in few.appended.values() for part in pair)
    check(network, many, tokens)

    def rates() -> Rates:
        short, long = step_s(network, few), step_s(network, many)
        return {"decode_tokens_per_s": 1 / long, "attention_gb_s": nbytes / max(long - short, LEAST_S) / 1e9}

    return rates


@torch.inference_mode()
def filled(network: DbrxForCausalLM, tokens: int) -> Recorder:
    """A cache that says it has so many tokens: those of a prompt that was read, and copies of their keys and values."""
    cache = Recorder(network.config.n_layers)
    network.transformer(random_ids(READ), past_key_values=cache)
    read = dict(cache.appended)
    while len(cache) < tokens:
        plan = AttentionPlan([len(cache)], min(READ, tokens - len(cache)), None, network.device)
        for layer, (k, v) in read.items():
            cache.append(layer, k[:, : plan.seq], -v[:, : plan.seq], plan)  # other values: to miss them would show
        cache.advance(plan)
    cache.appended = read
    return cache


@torch.inference_mode()
def check(network: DbrxForCausalLM, cache: Recorder, tokens: int) -> None:
    """The next token sees them all: it says so, and computes what plain attention does, which shows where it looks."""
    token = random_ids(1)
    shown = network(token, past_key_values=cache, output_attentions=True)
    assert shown.attentions is not None
    assert {each.shape[-1] for each in shown.attentions} == {tokens + 1}
    cache.trim(0, tokens)
    logits = network(token, past_key_values=cache).logits
    assert (cache.plan.starts, cache.plan.positions.tolist(), len(cache)) == ([tokens], [[tokens]], tokens + 1)
    assert (logits - shown.logits).norm() < MOST_OFF * shown.logits.norm()
    cache.trim(0, tokens)


@torch.inference_mode()
def step_s(network: DbrxForCausalLM, cache: KVCache) -> float:
    """Seconds of a step behind what the cache holds, which it holds again afterwards."""
    start, token, seconds = len(cache), random_ids(1), []
    for _ in range(STEPS):
        before = time.perf_counter()
        token = network(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(time.perf_counter() - before)
    cache.trim(0, start)
    return statistics.median(seconds)


def main(model: str, quantize: str, behind: str = "") -> None:
    start = time.perf_counter()
    network = DbrxForCausalLM.from_pretrained(model, quantize=quantize, pack=True)  # as the commands do
    load = time.perf_counter() - start
    rates = behind_many(network, int(behind)) if behind else from_the_front(network)
    print(json.dumps({"load_s": load}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(rates()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
