"""Tokens a second of a batch of eight, for bench_pairs.py: run in the checkout to measure, with its environment:

    python .../bench_batch.py MODEL [LOOKUP]

The last line is JSON as bench_peers.py reads it. The rate counts the whole work, prompts included; loading is apart.
LOOKUP: replies that repeat their prompts, with --lookup LOOKUP (auto; 0: no drafts).
"""

import json
import sys
import time

sys.path.insert(0, "")  # the checkout, not this file's folder

from dbrx_cli.engine import Done, Request
from dbrx_cli.engine.batched import answers
from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.options import ModelOptions, OutputOptions
from dbrx_cli.report import Report
from model.messages import Message
from model.sampling import SamplingParams

ROWS, NEW = 8, 64
TOPICS = ["the sea", "a lost dog", "rain in June", "an old clock", "two friends", "the moon", "bread", "a long road"]
LINE = "In June the rain fell on {}, and in July the rain fell on {} again. "


def prompt(topic: str, repeating: bool) -> str:
    return LINE.format(topic, topic) * 6 if repeating else f"Write a story about {topic}."


def main(model: str, lookup: str | None = None) -> None:
    repeating = lookup is not None
    params = SamplingParams(temperature=0, max_tokens=NEW, lookup="auto" if lookup == "auto" else 0)
    texts = [prompt(topic, repeating) for topic in TOPICS]
    requests = [Request(text if repeating else [Message("user", text)], params) for text in texts]
    engine = LocalEngine.load(ModelOptions(model=model), Report(OutputOptions(quiet=True)))
    list(
        answers(engine, enumerate([Request("Once", SamplingParams(temperature=0, max_tokens=2))]), 1)
    )  # pages are read
    start = time.perf_counter()
    done = [each for _, each in answers(engine, enumerate(requests), ROWS)]
    seconds = time.perf_counter() - start
    tokens = sum(len(each.token_ids) for each in done if isinstance(each, Done))
    read = sum(each.usage.prompt_tokens for each in done if isinstance(each, Done))
    print(json.dumps({"prefill_tokens_per_s": read / seconds, "decode_tokens_per_s": tokens / seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
