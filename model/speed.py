"""How fast a plan is: a ceiling from the machine's rates, and a prediction from what its kernels are measured to reach.

Every weight that a token needs is read once. The ceiling takes the full rate of the place where it lies for that;
computing hides behind the reading at batch 1. Imports without torch; `rates` measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass

from .load_plan import LoadPlan


@dataclass(frozen=True)
class Tier:
    """What a token waits for: a kind of reading, its bytes and seconds."""

    what: str
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Rates:
    """What this machine's kernels reach with one token: bytes a second, and seconds."""

    dense: float  # bytes a second: attention and head
    experts: float
    layer: float  # seconds of a layer beside its weights
    arrival: float = 0.0  # seconds a byte: what was read from the disk becomes what is computed with


def steps(plan: LoadPlan) -> Iterator[tuple[Tier, ...]]:
    """What one token of decoding waits for, one step after the other; the tiers of a step pass at the same time."""
    parts, machine = plan.sizes, plan.machine
    devices = {device.name: device for device in (*machine.gpus, machine.cpu)}
    chosen = parts.top_k * parts.expert
    missing = chosen * (1 - plan.hits)

    def tier(what: str, nbytes: float, bandwidth: float) -> Tier:
        return Tier(what, round(nbytes), nbytes / bandwidth)

    def link(nbytes: float) -> Tier:
        return tier("CPU memory to GPU", nbytes, machine.gpus[0].link)

    for layer in plan.layers:
        if plan.comes(layer):
            yield (link(parts.dense + parts.experts),)
            continue
        home = devices[layer.device]
        memory = "CPU memory" if home is machine.cpu else "GPU memory"
        yield (tier(memory, parts.dense, home.bandwidth),)
        experts = tier(memory, chosen, home.bandwidth)
        if layer.on_cpu:
            away = chosen * layer.on_cpu / parts.n_experts
            yield tier(memory, chosen - away, home.bandwidth), tier("CPU memory", away, machine.cpu.bandwidth)
        elif layer.experts == layer.device:
            yield (experts,)
        elif layer.experts == "cpu":
            yield (link(missing), experts)
        else:
            yield (tier("disk", missing, machine.disk.bandwidth), experts)
    if plan.runs:  # the head, beside the last layer
        last = plan.layers[-1]
        yield (link(parts.head) if plan.comes(last) else tier(memory, parts.head, home.bandwidth),)


def tiers(plan: LoadPlan) -> list[Tier]:
    """What one token of decoding waits for, by place."""
    found: dict[str, Tier] = {}
    for what, nbytes, seconds in (astuple(tier) for step in steps(plan) for tier in step):
        before = found.get(what, Tier(what, 0, 0.0))
        found[what] = Tier(what, before.nbytes + nbytes, before.seconds + seconds)
    return [tier for tier in found.values() if tier.nbytes]


def tokens_per_s(plan: LoadPlan) -> float:
    """Ceiling of decoding at batch 1."""
    seconds = sum(max(tier.seconds for tier in step) for step in steps(plan))
    return 1 / seconds if seconds else 0.0


def predict(plan: LoadPlan, rates: Rates) -> float:
    """Tokens a second of decoding at batch 1, at the beginning of a context, where a CPU computes all.

    Experts from the disk compute while others are read: of reading and computing the longer counts, and of the
    shorter one expert's part, in which the other waits.
    """
    parts, chosen = plan.sizes, plan.sizes.top_k * plan.sizes.expert
    missing = chosen * (1 - plan.hits)
    seconds = parts.head / rates.dense + len(plan.layers) * (parts.dense / rates.dense + rates.layer)
    seconds += (len(plan.layers) - plan.on_disk) * chosen / rates.experts
    read, compute = missing / plan.machine.disk.bandwidth, chosen / rates.experts + missing * rates.arrival
    return 1 / (seconds + plan.on_disk * (max(read, compute) + min(read, compute) / parts.top_k))


def load_s(plan: LoadPlan) -> float:
    """Seconds until it is ready: all that is resident comes from the disk once."""
    return sum(plan.weights.values()) / plan.machine.disk.bandwidth
