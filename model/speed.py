"""How fast a plan is: a ceiling from the machine's rates, and a prediction from what its kernels are measured to reach.

Every weight that a token needs is read once. The ceiling takes the full rate of the place where it lies for that;
computing hides behind the reading at batch 1. A prompt's experts beside a card: `Sides`. Imports without torch; `rates`
measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import NamedTuple

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
            away = chosen * layer.cpu_share
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


class Side(NamedTuple):
    """What an expert takes on one side: seconds, and more for each of its tokens."""

    start: float
    token: float

    def seconds(self, tokens: int) -> float:
        return self.start + tokens * self.token if tokens else 0.0


class Sides(NamedTuple):
    """Both sides of a bus, measured, and the seconds in which an expert comes over it.

    In a step of many tokens an expert of the CPU is better sent to the card if many of its tokens chose it: the way
    takes as long for one token as for a hundred.
    """

    cpu: Side
    card: Side
    bus: float
    sooner: float = 0.0  # seconds by which the card has computed an expert for one token before the CPU has

    def split(self, away: Mapping[int, int], here: Iterable[int]) -> tuple[list[int], float]:
        """The experts that come over the bus, and seconds until both sides are done.

        away: tokens of each of the CPU's experts; here: of the card's. Those with most tokens come, as many as let the
        slower side end soonest; none and all are among what is compared. With (cpu, card, bus) of 1 + 0.1 n, 0.01 n and
        5 ms, away {3: 60, 7: 90, 9: 10} and nothing here: none 19, one (7) max(9, 5.9), two max(2, 11.5), all 16.6 ms.
        """
        order = sorted(away, key=lambda expert: -away[expert])
        on_cpu, on_card = sum(map(self.cpu.seconds, away.values())), sum(map(self.card.seconds, here))
        ends = [max(on_cpu, on_card)]
        for tokens in (away[expert] for expert in order):
            on_cpu -= self.cpu.seconds(tokens)
            on_card += self.bus + self.card.seconds(tokens)
            ends.append(max(on_cpu, on_card))
        count = ends.index(min(ends))
        return order[:count], ends[count]


def load_s(plan: LoadPlan) -> float:
    """Seconds until it is ready: all that is resident comes from the disk once."""
    return sum(plan.weights.values()) / plan.machine.disk.bandwidth
