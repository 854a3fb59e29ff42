"""Write model/formats/demo_routing.npz: the groups and directions that make `demo-moe` of the demo's weights.

usage: python -m tests.make_demo_routing [--out FILE]

Needs the demo model and nothing else; about five minutes of one idle core. The texts:

- Python's own help pages, every second one, and three of its modules (`pydoc_data.topics`, `json.decoder`, `textwrap`,
  `heapq`; Python Software Foundation License 2);
- replies that the demo itself makes to the prompts below (SmolLM2-135M-Instruct, Apache License 2.0).

Everything random comes from SEED, so that the same Python, PyTorch and processor find the same numbers; others may
round sums otherwise and find such as are as good. What is judged, in tests/test_demo_moe.py, are other texts.

For each layer, on the normalised states x that enter it while the demo reads these texts:

- Groups: balanced k-means of the neurons on how much each adds to a token's output, |activation|·|column of w2|.
- g: from each of the eight largest principal components, y = the sign of g·x and g = the ridge regression of y on x in
  turn, until the signs stay. Such a g·x keeps away from 0; the one that does so best is taken.
- r of a group in a block: the same, twice, from the group's first principal component over the block's tokens.
"""

from __future__ import annotations

import argparse
import heapq
import inspect
import json.decoder
import textwrap
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model import AutoTokenizer, DbrxForCausalLM
from model.formats.demo_routing import FILE, GROUPS
from model.formats.llama_gguf import BLOCK
from model.messages import Message

Array = NDArray[np.float32]
SEED = 31
SEQUENCE = 256
CHAT_SEQUENCES, TEXT_SEQUENCES = 18, 22
SYSTEM_TOKENS, SYSTEMS = 22, 5  # of 47 copies of the system prompt so many are kept
TASKS = (
    "Explain {} to a child.",
    "List four facts about {}.",
    "Write a short story about {}.",
    "What is {} good for?",
    "Write a Python function that prints a sentence about {}.",
    "Answer with one sentence: why do people like {}?",
)
SUBJECTS = "rain", "bread", "the moon", "bicycles", "music", "Rome", "bees", "money", "tea", "glass", "chess", "whales"


def chats(network: DbrxForCausalLM, tokenizer: Any) -> list[int]:
    """The demo's replies to all prompts, one conversation after the other."""
    prompts = [
        tokenizer.encode_segments(tokenizer.chat_template.segments([Message("user", task.format(subject))]))
        for task in TASKS
        for subject in SUBJECTS
    ]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    whole = network.generate(ids, mask, max_new_tokens=64, do_sample=True, temperature=0.7, seed=SEED)
    end = tokenizer.special_tokens["<|im_end|>"]
    joined = []
    for prompt, row in zip(prompts, whole.tolist(), strict=True):
        reply = row[longest:]
        joined += prompt + (reply[: reply.index(end) + 1] if end in reply else reply)
    return joined


def pages(tokenizer: Any) -> list[int]:
    """The first tokens of each page and module."""
    texts = [topics[name] for name in sorted(topics)[::2]]
    texts += [inspect.getsource(module) for module in (json.decoder, textwrap, heapq)]
    return [i for text in texts for i in tokenizer.encode(text)[:192]]


def sequences(network: DbrxForCausalLM, tokenizer: Any) -> tuple[Tensor, NDArray[np.bool_]]:
    """ids [n, SEQUENCE], and which of their tokens are counted [n * SEQUENCE]: not each copy of the system prompt."""
    ids = chats(network, tokenizer)[: CHAT_SEQUENCES * SEQUENCE] + pages(tokenizer)[: TEXT_SEQUENCES * SEQUENCE]
    counted = np.ones(len(ids), bool)
    opening = tokenizer.encode_segments(tokenizer.chat_template.segments([Message("user", "")]))[:2]
    starts = [at for at in range(len(ids) - 1) if ids[at : at + 2] == opening]
    for start in starts[SYSTEMS:]:
        counted[start : start + SYSTEM_TOKENS] = False
    counted[::SEQUENCE] = False
    return torch.tensor(ids).view(-1, SEQUENCE), counted


def balanced_clusters(points: Array, rng: np.random.Generator) -> NDArray[np.int64]:
    """points [n, dim] -> a cluster of 0 .. GROUPS - 1 for each, all of the same size."""
    n = len(points)
    centres = points[rng.choice(n, GROUPS, replace=False)]
    for _ in range(8):
        near = points @ centres.T - (centres * centres).sum(1) / 2
        best = np.sort(near, 1)
        labels, room = np.full(n, -1), [n // GROUPS] * GROUPS
        for i in np.argsort(best[:, -2] - best[:, -1]):  # the surest first
            labels[i] = next(group for group in np.argsort(-near[i]) if room[group])
            room[labels[i]] -= 1
        centres = np.stack([points[labels == group].mean(0) for group in range(GROUPS)])
    return labels


class Ridge:
    """Linear regression of anything on x [n, hidden]."""

    def __init__(self, x: Array) -> None:
        gram = (x.T @ x).astype(np.float64)
        gram[np.diag_indices_from(gram)] += 0.1 * np.trace(gram) / len(gram)
        self.x, self.inverse = x, np.linalg.inv(gram).astype(np.float32)

    def __call__(self, y: Array) -> Array:
        found: Array = self.inverse @ (self.x.T @ y.astype(np.float32))
        return found


def find_g(x: Array) -> Array:
    """The direction [hidden] along which states keep away from 0 best; half of them are beyond ±1."""
    ridge, centred = Ridge(x), x - x.mean(0)
    _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    found = []
    for k in range(1, 9):
        scores = centred @ vectors[:, -k].astype(np.float32)
        signs = np.sign(scores - np.median(scores))
        for _ in range(15):
            g = ridge(signs)
            before, signs = signs, np.sign(x @ g)
            if (before == signs).mean() > 0.9995:
                break
        sizes = np.abs(x @ g)
        near = (sizes < 0.2 * np.median(sizes)).mean()
        uneven = max(0.0, abs(float((x @ g > 0).mean()) - 0.5) - 0.15)
        found.append((near + 10 * uneven, k, g / np.median(sizes)))
    return min(found)[2]


def find_r(x: Array, ridge: Ridge, shares: Array, rng: np.random.Generator) -> Array:
    """The direction [hidden] that halves a block's tokens by what a group does; shares [n, neurons of the group]."""
    centred = shares - shares.mean(0)
    component = rng.standard_normal(centred.shape[1]).astype(np.float32)
    for _ in range(10):
        component = centred.T @ (centred @ component)
        component /= np.linalg.norm(component)
    scores = centred @ component
    signs = np.sign(scores - np.median(scores))
    for _ in range(2):
        scores = x @ ridge(signs)
        signs = np.sign(scores - 0.8 * np.median(scores))
    r = ridge(signs)
    return r / np.median(np.abs(x @ r))


def find_layer(x: Array, shares: Array, rng: np.random.Generator) -> tuple[Any, Array]:
    """Groups [ffn] and directions [9, hidden] of a layer.

    x [n, hidden]; shares [n, ffn]: what each neuron adds to the output, of length 1 a token.
    """
    directions = [find_g(x)]
    groups = balanced_clusters(np.ascontiguousarray(shares[rng.choice(len(x), 1500, replace=False)].T), rng)
    side = x @ directions[0] > 0
    for block in (side, ~side):
        states, ridge = x[block], Ridge(x[block])
        for group in range(GROUPS):
            directions.append(find_r(states, ridge, shares[block][:, groups == group], rng))
    return groups, np.stack(directions)


def main() -> None:
    from dbrx_cli.demo import ensure_demo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order
    folder = ensure_demo(print)
    network = DbrxForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        ids, counted = sequences(network, AutoTokenizer.from_pretrained(folder))
    rng = np.random.default_rng(SEED)
    found: list[tuple[Any, Array]] = []

    def listen(ffn: Any) -> None:
        """Have a layer tell what its neurons do, and compute as before: its four experts are one matrix, in order."""
        w1, v1, w2 = (getattr(ffn.experts.mlp, name) for name in ("w1", "v1", "w2"))

        def forward(x: Tensor) -> tuple[Tensor, None]:
            flat = x.flatten(0, 1)
            hidden = functional.silu(flat @ w1.T) * (flat @ v1.T)
            shares = (hidden.abs() * w2.norm(dim=1)).numpy()
            shares /= np.linalg.norm(shares, axis=1, keepdims=True)
            states = (flat.numpy().reshape(-1, 4) @ BLOCK).reshape(len(shares), -1)  # times Q
            found.append(find_layer(states[counted], shares[counted], rng))
            print(f"layer {len(found) - 1}", flush=True)
            return (hidden @ w2 / GROUPS).view_as(x), None

        ffn.forward = forward

    for block in network.transformer.blocks:
        listen(block.ffn)
    with torch.inference_mode():
        network.transformer(ids)
    save(args.out, *(np.stack(part) for part in zip(*found, strict=True)))


def save(out: Path, groups: Any, directions: Array) -> None:
    """Directions go into 8 bits each: they need no more."""
    steps = np.abs(directions).max(-1) / 127
    rounded = np.round(directions / steps[..., None]).astype(np.int8)
    np.savez_compressed(out, groups=groups.astype(np.uint8), directions=rounded, steps=steps)


if __name__ == "__main__":
    main()
