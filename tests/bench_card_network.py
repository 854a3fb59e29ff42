"""Whole networks of DBRX's widths on a card: what they load, read and decode, and transformers beside them.

python -m tests.bench_card_network PREFIX [FOLDER]: writes PREFIX.json and PREFIX.md in two minutes; `make gpu`. FOLDER:
where transformers 4.57.6 was installed (`pip install --target`), which has DBRX as its makers meant it. Without a card,
under TRITON_INTERPRET=1, the same calls on small shapes, whose seconds mean nothing: `make gpu-rehearsal`.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor

from model import DbrxForCausalLM, SamplingParams, packing
from model.checkpoint import expected_tensors
from model.config import DbrxConfig, official
from model.kernels.cuda_block import decode_on_card
from model.kernels.cuda_glu import CudaGlu
from model.kernels.cuda_linear import CudaLinear
from model.kv_cache import BLOCK_TOKENS
from model.kv_pool import KVPool
from model.model_files import ModelFiles
from model.scheduler import Scheduler
from model.sequence import Sequence
from model.weights import Extent, FloatExpert
from tests.bench_card import CARD, DEVICE, Row, card_bandwidth, dense_rate

LAYERS = 8 if CARD else 1  # 53 GB in bfloat16
PROMPT, BEHIND = (2048, (512, 8192, 32000)) if CARD else (12, (4, 20))  # tokens
NEW = 48 if CARD else 6
FORMS = ("int4", "int8", "none") if CARD else ("int4", "none")
SMALL = {"d_model": 64, "n_heads": 2, "vocab_size": 60}
# Of the measured bandwidth; of the dense rate; seconds; times transformers.
WANTED_DECODE, WANTED_PROMPT, GRAPH_S = {"int4": 0.65, "int8": 0.70, "none": 0.80}, 0.40, 5.0
TIMES_DECODE, TIMES_PROMPT = 5.0, 3.0


def shapes() -> DbrxConfig:
    """DBRX with fewer layers; without a card with small ones."""
    config = replace(official(), n_layers=LAYERS)
    if CARD:
        return config
    ffn = replace(config.ffn_config, ffn_hidden_size=40)
    return replace(config, **SMALL, attn_config=replace(config.attn_config, kv_n_heads=1), ffn_config=ffn)


class MadeUp:
    """Weights with one expert in a file, which all of them are, and no other file. See `model.weights`."""

    quantization, group, kept, plain_experts = "none", None, None, True

    def __init__(self, config: DbrxConfig, source: Path) -> None:
        self.config, self.source = config, source
        self._shapes = expected_tensors(config)
        self._made = cache(self._make)
        self._expert = config.ffn_config.ffn_hidden_size, config.d_model
        source.write_bytes(torch.cat([self._make(self._expert) for _ in range(3)]).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._made.cache_clear()

    def _make(self, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        made = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) / shape[-1] ** 0.5
        return made.cpu()

    def read(self, name: str, dtype: torch.dtype | None = None, device: Any = "cpu", owned: bool = False) -> Tensor:
        made = self._made(tuple(self._shapes[name]))
        return made.to(device, dtype or torch.bfloat16, copy=owned)

    def nbytes_of(self, name: str) -> int:
        return 2 * torch.Size(self._shapes[name]).numel()

    def expert_extents(self, layer: int, expert: int) -> tuple[Extent]:
        return (Extent(self.source, 0, self.source.stat().st_size),)

    def expert(self, layer: int, expert: int, data: tuple[Tensor]) -> FloatExpert:
        return FloatExpert(*data[0].view(torch.bfloat16).view(3, *self._expert).unbind())

    def dtypes(self) -> Counter[str]:
        return Counter(BF16=sum(map(self.nbytes_of, self._shapes)))

    def give_back(self) -> None:
        pass


def load(weights: MadeUp, form: str) -> DbrxForCausalLM:
    """As `dbrx` loads a checkpoint for a card; without one all is on the CPU, in the card's kernels."""
    with ExitStack() as stack:
        stack.enter_context(patch("model.loading.open_weights", lambda files: weights))
        if not CARD:
            stack.enter_context(
                patch.object(packing, "choose", lambda name, group, device: CudaLinear(name, group or 0, DEVICE))
            )
            stack.enter_context(patch.object(packing, "experts_of", CudaGlu))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        where, context = "cuda:0" if CARD else "cpu", BEHIND[-1] + PROMPT
        network = DbrxForCausalLM.from_pretrained(
            ModelFiles(Path(folder)), device_map=where, quantize=form, pack=True, context=context
        )
    if not CARD:
        decode_on_card(network)
    return network


def reply(network: DbrxForCausalLM, prompt: int, new: int, params: SamplingParams) -> tuple[list[int], list[float]]:
    """Its ids, and the seconds after which each came."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(network.config.vocab_size, (prompt,), generator=generator).tolist()
    seeded = torch.Generator(network.device).manual_seed(2)
    row = Sequence(ids, replace(params, max_tokens=new), generator=seeded)
    scheduler = Scheduler(network, 1, KVPool(network, block_tokens=BLOCK_TOKENS))
    scheduler.add(row)
    start, came = time.perf_counter(), list[float]()
    while len(scheduler):
        came += [time.perf_counter() - start for _ in scheduler.step()]
    return row.ids, came


def between(came: list[float]) -> float:
    """Seconds from a token to the next, the median, but for the first, which compile and record, and the last one."""
    return statistics.median(b - a for a, b in pairwise(came[2:-1]))


def prompt_operations(config: DbrxConfig, tokens: int) -> float:
    """Of a prompt's products: two a weight that a token meets."""
    kv = config.attn_config.kv_n_heads * config.head_dim
    attention = config.d_model * (2 * config.d_model + 2 * kv)
    experts = 3 * config.ffn_config.moe_top_k * config.d_model * config.ffn_config.ffn_hidden_size
    return 2.0 * tokens * config.n_layers * (attention + experts)


def measure(weights: MadeUp, form: str, bandwidth: float, dense: float) -> Row:
    greedy, drawn = SamplingParams(temperature=0), SamplingParams(temperature=1.0, top_p=0.9)
    begun = time.perf_counter()
    network = load(weights, form)
    loaded = time.perf_counter() - begun
    kernels = network.kernels
    assert kernels is not None and "triton" in kernels.name, "the card's kernels are not used"
    _, came = reply(network, 16, 8, greedy)  # compiles, and records
    graph_s = came[4] - came[0]
    reply(network, PROMPT, 1, greedy)  # once for what is compiled and tuned
    _, (read,) = reply(network, PROMPT, 1, greedy)
    plan = network.load_plan
    assert plan is not None
    parts = plan.sizes
    nbytes = parts.n_layers * (parts.dense + parts.top_k * parts.expert) + parts.head  # of the weights for a token
    found, contexts = {}, []
    for tokens in BEHIND:
        found[tokens], came = reply(network, tokens, NEW, greedy)
        each, kv = between(came), tokens * parts.kv * parts.n_layers
        contexts.append(
            {"tokens": tokens, "ms": each * 1e3, "of_bandwidth": (nbytes + kv) / each / bandwidth, "kv_bytes": kv}
        )
    for row in contexts[1:]:  # what attention to more tokens takes beyond that to few
        more = (row["ms"] - contexts[0]["ms"]) / 1e3
        row["attention_of_bandwidth"] = (
            (row["kv_bytes"] - contexts[0]["kv_bytes"]) / more / bandwidth if more > 0 else None
        )
    seeded, _ = reply(network, BEHIND[0], NEW, drawn)
    graph = getattr(network.transformer.at_once, "graph", "none")
    decode_on_card(network, records=False)
    launched, came = reply(network, BEHIND[0], NEW, greedy)
    same = launched == found[BEHIND[0]] and reply(network, BEHIND[0], NEW, drawn)[0] == seeded
    return {
        "form": form,
        "kernels": kernels.name,
        "load_s": loaded,
        "graph": graph,
        "graph_s": graph_s,
        "prompt_tokens_s": PROMPT / read,
        "prompt_of_dense": prompt_operations(network.config, PROMPT) / read / dense,
        "token_bytes": nbytes,
        "contexts": contexts,
        "launched_ms": between(came) * 1e3,
        "same_without_graph": same,
    }


def reference(folder: str, config: DbrxConfig) -> Row:
    """The same shapes in transformers, in a process of its own: its weights are random, too."""
    attn, ffn = config.attn_config, config.ffn_config
    shape = {name: getattr(config, name) for name in ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")}
    shape["attn_config"] = {"kv_n_heads": attn.kv_n_heads, "clip_qkv": attn.clip_qkv, "rope_theta": attn.rope_theta}
    names = "ffn_hidden_size", "moe_num_experts", "moe_top_k"
    shape["ffn_config"] = {name: getattr(ffn, name) for name in names}
    given = json.dumps([shape, PROMPT, NEW, DEVICE.type])
    environment = {**os.environ, "PYTHONPATH": folder}
    command = [sys.executable, str(Path(__file__).with_name("transformers_on_card.py")), given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"fault": done.stderr.strip().splitlines()[-1]}
    found: Row = json.loads(done.stdout)
    return found


def main() -> None:
    prefix, folder = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    torch.manual_seed(0)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.triton_interpreter import prepare

        prepare()
    config, bandwidth, dense = shapes(), card_bandwidth(), dense_rate()
    found: Row = {
        "card": torch.cuda.get_device_name() if CARD else None,
        "torch": torch.__version__,
        "layers": LAYERS,
        "bandwidth": bandwidth,
        "dense": dense,
        "networks": [],
        "transformers": None,
    }
    with tempfile.TemporaryDirectory() as files, MadeUp(config, Path(files) / "expert") as weights:
        for form in FORMS:
            found["networks"].append(measure(weights, form, bandwidth, dense))
            write(prefix, found)  # what was measured stays, whatever comes
            gc.collect()
            if CARD:
                torch.cuda.empty_cache()
    if folder:
        found["transformers"] = reference(folder, config)
        write(prefix, found)
    print(page(found))


def write(prefix: Path, found: Row) -> None:
    prefix.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    prefix.with_suffix(".md").write_text(page(found), "utf-8")


def page(found: Row) -> str:
    """The figures as Markdown, and which are below what is wanted."""
    where = f"{found['card'] or 'no card: a rehearsal, whose figures mean nothing'}, torch {found['torch']}"
    layers, behind = found["layers"], found["networks"][0]["contexts"]
    lines = [f"# {layers} layers of DBRX's widths on {where}\n"]
    lines += ["| weights | loaded, s | until a graph, s | prompt, tokens/s | of the dense rate |"]
    lines += ["|---|---|---|---|---|"]
    for row in found["networks"]:
        prompt = f"{row['prompt_tokens_s']:.0f} | {row['prompt_of_dense']:.0%}"
        lines.append(f"| {row['form']} | {row['load_s']:.1f} | {row['graph_s']:.2f} | {prompt} |")
    contexts = "".join(f" behind {each['tokens']}, ms |" for each in behind)
    lines += [
        f"\n| weights | GB a token |{contexts} of the bandwidth | attention's | launched one by one, ms | same text |"
    ]
    lines += ["|---|---|" + "---|" * (len(behind) + 4)]
    for row in found["networks"]:
        first, *_, last = row["contexts"]
        attention = last["attention_of_bandwidth"]
        cells = [row["form"], f"{row['token_bytes'] / 1e9:.2f}", *(f"{each['ms']:.3f}" for each in row["contexts"])]
        cells += [f"{first['of_bandwidth']:.0%}", "-" if attention is None else f"{attention:.0%}"]
        lines.append(
            "| "
            + " | ".join([*cells, f"{row['launched_ms']:.3f}", "yes" if row["same_without_graph"] else "NO"])
            + " |"
        )
    if (other := found["transformers"]) and "ms" in other:
        lines.append(
            f"\ntransformers {other['version']}: {other['ms']:.3f} ms a token, "
            f"{other['prompt_tokens_s']:.0f} tokens/s of a prompt."
        )
    elif other:
        lines.append(f"\ntransformers did not run: {other['fault']}")
    missed = list(below(found))
    lines += (
        ["\nBelow what is wanted: " + "; ".join(missed) + "." if missed else "\nAll is as wanted."]
        if found["card"]
        else []
    )
    return "\n".join(lines) + "\n"


def below(found: Row) -> Iterator[str]:
    """Figures that miss what is wanted, in words."""
    other = found["transformers"] or {}
    for row in found["networks"]:
        form, first = row["form"], row["contexts"][0]
        figures = {
            "decode, of the bandwidth": (first["of_bandwidth"], WANTED_DECODE[form]),
            "prompt, of the dense rate": (row["prompt_of_dense"], WANTED_PROMPT),
            "seconds to a graph, of those allowed": (GRAPH_S / row["graph_s"], 1.0),
        }
        if "ms" in other and form == "none":
            figures["decode, times transformers"] = (other["ms"] / first["ms"], TIMES_DECODE)
            figures["prompt, times transformers"] = (row["prompt_tokens_s"] / other["prompt_tokens_s"], TIMES_PROMPT)
        for what, (value, wanted) in figures.items():
            if value < wanted:
                yield f"{form} {what} {value:.2f} ({wanted})"
        if not row["same_without_graph"]:
            yield f"{form} gives another text without a graph"


if __name__ == "__main__":
    main()
