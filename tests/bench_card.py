"""What kernels for cards reach, and experts on both sides of the bus: `make gpu`, without a card `make gpu-rehearsal`.

python -m tests.bench_card PREFIX: writes PREFIX.json and PREFIX.md in two minutes. On a card the products of DBRX's
widths against its measured bandwidth; under TRITON_INTERPRET=1 the same calls on small shapes, whose seconds mean
nothing. Then a layer whose experts the CPU computes in part; without a card, what stands in its place sleeps as long as
one would take.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.config import official
from model.experts import Bus, HybridExperts, PackedExperts
from model.kernels import GluExpertKernel, Packed, choose, experts_of
from model.load_plan import LoadOptions, Stored
from model.load_planner import plan_load
from model.machine import memory_bandwidth
from model.placement import Device, Machine
from model.speed import steps
from model.weights import FloatExpert

CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CARD else "cpu")
FORMS: tuple[tuple[str, int | None], ...] = (("int4", 32), ("int4", 128), ("int8", None))
WIDTH, HIDDEN = (6144, 10752) if CARD else (32, 32)
EXPERTS, TOP_K, ON_CARD = 16, 4, 5
ALL_FORMS = (*FORMS, ("bfloat16", None))
PROMPT = 2048 if CARD else 16  # tokens
BOTH_SIDES = 6144, 10752  # DBRX's widths; of 16 experts 11 lie in the CPU's memory, 2.2 GB in int8
SLEEPS = 100e9  # bytes a second of what stands in a card's place
ROUNDS = 40
Row = dict[str, Any]


def experts(kernel: GluExpertKernel, width: int, hidden: int, count: int, device: torch.device) -> list[Packed]:
    """So many times one expert, each in memory of its own."""
    floats = [torch.randn(hidden, width, device=device) / width**0.5 for _ in range(3)]
    if kernel.quantization == "none":
        return [kernel.pack(FloatExpert(*floats)) for _ in range(count)]
    stored = kernel.quantize(FloatExpert(*floats))
    parts = [[type(m)(*(None if p is None else p.clone() for p in m)) for m in stored] for _ in range(count)]
    return [kernel.load(type(stored)(*each)) for each in parts]


def seconds(work: Callable[[int], object], rounds: int = ROUNDS, warm: int = 3) -> float:
    """The median of some rounds, after others to warm up."""
    taken = []
    for i in range(rounds + warm):
        start = time.perf_counter()
        work(i)
        if CARD:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[warm:])


def card_bandwidth() -> float:
    """Bytes a second that a card copies, read and written."""
    source = torch.empty(2**30 if CARD else 2**20, dtype=torch.uint8, device=DEVICE)
    to = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda _: to.copy_(source))


def dense_rate() -> float:
    """Operations a second of a card's own product in bfloat16."""
    x, weight = (torch.randn(n, WIDTH, device=DEVICE, dtype=torch.bfloat16) for n in (PROMPT, HIDDEN))
    return 2 * PROMPT * WIDTH * HIDDEN / seconds(lambda _: x @ weight.t())


def products(form: str, group: int | None, bandwidth: float, dense: float) -> Row:
    """A layer's chosen experts for one token, and for a prompt, in DBRX's widths."""
    from model.kernels.cuda_glu import CudaGlu
    from model.kernels.cuda_linear import CudaLinear

    kernel = CudaGlu(CudaLinear(form, group or 0, str(DEVICE)), "silu")
    layer = PackedExperts(kernel, experts(kernel, WIDTH, HIDDEN, EXPERTS, DEVICE))
    x, weights = torch.randn(1, WIDTH, device=DEVICE), torch.full((1, TOP_K), 0.25, device=DEVICE)
    ids = [torch.arange(4 * i, 4 * i + 4, device=DEVICE)[None] % EXPERTS for i in range(4)]
    rounds = (ROUNDS, 3) if CARD else (1, 0)  # one that is interpreted takes seconds
    taken = seconds(lambda i: layer(x, ids[i % 4], weights), *rounds)
    rate = TOP_K * kernel.nbytes(HIDDEN, WIDTH, 2) / taken
    rows, even = torch.randn(PROMPT, WIDTH, device=DEVICE), weights.expand(PROMPT, TOP_K).contiguous()
    chosen = torch.rand(PROMPT, EXPERTS, device=DEVICE).topk(TOP_K).indices
    prompt = seconds(lambda _: layer(rows, chosen, even), *((10, 2) if CARD else (1, 0)))
    return {
        "form": form,
        "group": group,
        "ms": taken * 1e3,
        "of_bandwidth": rate / bandwidth,
        "prompt_ms": prompt * 1e3,
        "prompt_of_dense": 2 * 3 * PROMPT * TOP_K * WIDTH * HIDDEN / prompt / dense,
    }


class Timed(nn.Module):
    """Notes when it computes; `rate`: it sleeps as long as a card of that rate would take, and then adds nothing."""

    def __init__(self, inner: nn.Module, rate: float | None = None, nbytes: int = 0) -> None:
        super().__init__()
        self.inner, self.rate, self.nbytes = inner, rate, nbytes
        self.spans: list[tuple[float, float]] = []

    def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
        start = time.perf_counter()
        if self.rate is None:
            out: Tensor = self.inner(x, expert_ids, router_weights)
        else:
            time.sleep(int((expert_ids < ON_CARD).sum()) * self.nbytes / self.rate)
            out = torch.zeros_like(x)
        self.spans.append((start, time.perf_counter()))
        return out


def both_sides(form: str, group: int | None, memory: float) -> Row:
    """A layer with 5 of 16 experts on a card: the CPU's rate alone, overlap, and seconds against the plan's."""
    width, hidden = BOTH_SIDES
    linear = choose(form, group)
    assert linear is not None
    cpu = experts_of(linear, "silu")
    nbytes, absent = cpu.nbytes(hidden, width, 2), [()]
    packed = experts(cpu, width, hidden, EXPERTS - ON_CARD, torch.device("cpu"))
    on_cpu = Timed(PackedExperts(cpu, absent * ON_CARD + packed))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randperm(EXPERTS, generator=generator)[None, :TOP_K] for _ in range(64)]
    x, weights = torch.randn(1, width), torch.full((1, TOP_K), 0.25)
    away = [torch.arange(ON_CARD + i, ON_CARD + i + TOP_K)[None] for i in (0, 4, 7)]
    alone = TOP_K * nbytes / seconds(lambda i: on_cpu(x, away[i % 3], weights))
    if CARD:
        own = choose(form, group, torch.device("cuda", 0))
        assert own is not None
        kernel = experts_of(own, "silu")
        held = experts(kernel, width, hidden, ON_CARD, DEVICE)
        on_card = Timed(PackedExperts(kernel, held + absent * (EXPERTS - ON_CARD)))
        card_rate = card_bandwidth()
    else:
        on_card, card_rate = Timed(nn.Identity(), SLEEPS, nbytes), SLEEPS
    layer, to_card = HybridExperts(on_card, on_cpu, Bus()), [each.to(DEVICE) for each in ids]
    there, even = x.to(DEVICE), weights.to(DEVICE)
    on_cpu.spans.clear()
    taken = [seconds(lambda i, k=k: layer(there, to_card[(k + i) % 64], even)) for k in (0, 16, 32)]
    pairs = zip(on_card.spans, on_cpu.spans, strict=True)
    overlaps = [
        max(0.0, min(a[1], b[1]) - max(a[0], b[0])) / min(a[1] - a[0], b[1] - b[0])
        for a, b in pairs
        if min(a[1] - a[0], b[1] - b[0]) > 1e-4  # none chosen on one side: nothing to hide
    ]
    return {
        "form": form,
        "group": group,
        "cpu_alone_of_memory": alone / memory,
        "overlap": statistics.median(overlaps) if overlaps else None,
        "ms": statistics.mean(taken) * 1e3,
        "planned_ms": planned(form, width, hidden, nbytes, card_rate, alone) * 1e3,
        "bus_bytes_a_token": (layer.bus.down + layer.bus.up) / len(on_cpu.spans),
    }


def planned(form: str, width: int, hidden: int, nbytes: int, card: float, cpu: float) -> float:
    """Seconds that a plan gives the experts of a layer of which the card has room for five."""
    ffn = replace(official().ffn_config, ffn_hidden_size=hidden)
    config = replace(official(), d_model=width, n_heads=24, n_layers=1, ffn_config=ffn)
    options = LoadOptions(quantize=form, device_map="auto", offload="auto", context=1)
    for memory in range(0, 2**33, nbytes // 2):
        machine = Machine((Device("cuda:0", memory, card, 25e9),), Device("cpu", 2**40, cpu), Device("disk", 0, 3e9))
        plan = plan_load(config, Stored(), machine, options)
        if plan.runs and plan.on_cpu == EXPERTS - ON_CARD:
            return max(tier.seconds for step in steps(plan) if len(step) == 2 for tier in step)
    raise AssertionError("no memory gives the card five experts")


def main() -> None:
    torch.manual_seed(0)
    memory, bandwidth, dense = memory_bandwidth(), card_bandwidth(), dense_rate()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        from tests.triton_interpreter import prepare

        prepare()
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if CARD else None,
        "torch": torch.__version__,
        "card_gb_s": bandwidth / 1e9 if CARD else None,
        "memory_gb_s": memory / 1e9,
        "dense_tflop_s": dense / 1e12 if CARD else None,
        "products": [products(*form, bandwidth, dense) for form in ALL_FORMS] if CARD or interpreted else [],
        "both_sides": [both_sides(*form, memory) for form in FORMS],
    }
    prefix = Path(sys.argv[1])
    prefix.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    prefix.with_suffix(".md").write_text(page(found), "utf-8")
    print(page(found))


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"# Kernels for cards on {found['card'] or 'no card: a rehearsal'}\n", f"torch {found['torch']}."]
    if found["card"]:
        dense = f"{found['dense_tflop_s']:.0f} TFLOP/s in bfloat16"
        lines += [f"It copies {found['card_gb_s']:.0f} GB/s, and multiplies {dense}.\n"]
        lines += [f"| a layer's experts | ms a token | of the bandwidth | ms for {PROMPT} tokens | of the dense rate |"]
        lines += ["|---|---|---|---|---|"]
        for row in found["products"]:
            prompt = f"{row['prompt_ms']:.1f} | {row['prompt_of_dense']:.0%}"
            lines.append(f"| {_name(row)} | {row['ms']:.3f} | {row['of_bandwidth']:.0%} | {prompt} |")
    lines += [
        f"\nThe CPU reads {found['memory_gb_s']:.1f} GB/s. A layer with {ON_CARD} of {EXPERTS} experts on the card:\n"
    ]
    lines += ["| form | CPU's experts alone, of its memory | overlap | ms a layer | planned | bytes over the bus |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in found["both_sides"]:
        overlap = f"{row['overlap']:.0%}" if row["overlap"] is not None else "-"
        times = f"{row['ms']:.2f} | {row['planned_ms']:.2f} | {row['bus_bytes_a_token']:.0f}"
        lines.append(f"| {_name(row)} | {row['cpu_alone_of_memory']:.0%} | {overlap} | {times} |")
    return "\n".join(lines) + "\n"


def _name(row: Row) -> str:
    return f"{row['form']} g{row['group']}" if row["group"] else str(row["form"])


if __name__ == "__main__":
    main()
