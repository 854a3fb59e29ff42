"""Rates of a loaded network, asked again and again, for bench_pairs.py: run in the checkout to measure:

    python .../bench_turns.py MODEL QUANTIZE

Loads, prints {"load_s": ...}, then for each line of stdin reads a prompt, makes tokens and prints JSON as
bench_peers.py reads it. Two programs that take turns of seconds meet the same state of the machine, which two runs of
theirs do not.
"""

import json
import sys
import time

sys.path.insert(0, "")  # the checkout, not this file's folder

import torch

from model import DbrxForCausalLM

PROMPT, SHORT, NEW = 256, 8, 16


def tokens_per_s(network: DbrxForCausalLM, prompt: int, new: int, counted: int) -> float:
    ids = torch.randint(10, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    out = network.generate(ids, max_new_tokens=new, do_sample=False)
    assert out.shape[1] == prompt + new
    return counted / (time.perf_counter() - start)


def main(model: str, quantize: str) -> None:
    start = time.perf_counter()
    network = DbrxForCausalLM.from_pretrained(model, quantize=quantize, pack=True)  # as the commands do
    load = time.perf_counter() - start
    tokens_per_s(network, PROMPT, 2, PROMPT)  # pages are read, threads are started
    print(json.dumps({"load_s": load}), flush=True)
    for _ in sys.stdin:
        prefill = tokens_per_s(network, PROMPT, 1, PROMPT)
        decode = tokens_per_s(network, SHORT, NEW, NEW)
        print(json.dumps({"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
