"""Experts in two places, a card and the CPU's memory: each computes where it lies, at the same time.

Some cross the bus (`Crossing`): in a step of many tokens those of the CPU that most tokens chose, and between two
replies those that turned out to be of more use on the other side.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from ..expert_use import Counts, moves
from ..kernels import GluExpertKernel, Packed
from ..kernels.dispatch import moe_forward
from ..speed import Side, Sides
from ..weights import QuantizedExpert
from .packed import PackedExperts

SHORT = 8  # tokens of a step in which no weight crosses: one of decoding
FEW, MANY, ROUNDS = 16, 128, 2  # tokens for which an expert is timed, and how often


class Bus:
    """Between cards and the CPU, which computes on a thread of its own; what crosses is counted.

    A layer sends its activations down and gets their sums. Only that thread waits for a card.
    """

    def __init__(self, used: Counts = ()) -> None:
        """used: how many tokens chose each of a network's experts so far."""
        self.down = self.up = self.weights = 0  # bytes: activations, sums, and experts
        self.used = [list(counts) for counts in used]  # short steps are added
        self.sides: Sides | None = None  # measured in the first long step
        self._thread = ThreadPoolExecutor(1, "cpu-experts")

    def compute(self, work: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Tensor]:
        """Begin `work` on the CPU with copies of the card's tensors; gives what waits for its answer, on the card."""
        card = inputs[0].device
        is_card = card.type == "cuda"
        sent = [torch.empty(each.shape, dtype=each.dtype, pin_memory=is_card) for each in inputs]
        for to, of in zip(sent, inputs, strict=True):
            to.copy_(of, non_blocking=is_card)
            self.down += of.nbytes
        arrived = torch.cuda.current_stream(card).record_event() if is_card else None

        def run() -> Tensor:
            if arrived is not None:
                arrived.synchronize()
            with torch.inference_mode():
                out = work(*sent)
                return out.pin_memory() if is_card else out

        coming = self._thread.submit(run)

        def answer() -> Tensor:
            out = coming.result()
            self.up += out.nbytes
            return out.to(card, non_blocking=True)

        return answer

    def rearrange(self, layers: Sequence[HybridExperts], top_k: int) -> None:
        """Between two replies: experts of these layers change places where their use says that it pays.

        On the thread that no Ctrl-C reaches, for half a change would make wrong sums.
        """
        self._thread.submit(self._rearrange, layers, top_k).result()

    def _rearrange(self, layers: Sequence[HybridExperts], top_k: int) -> None:
        able = [(layer, layer.crossing) for layer in layers if layer.crossing is not None]
        if self.sides is None or not able:
            return
        used = [crossing.used for _, crossing in able]
        away = [[i for i, packed in enumerate(crossing.away) if packed] for _, crossing in able]
        with contextlib.suppress(MemoryError, RuntimeError):  # no room: what was to move stays
            for move in moves(used, away, top_k, self.sides.sooner, self.sides.bus):
                able[move.layer][0].swap(move.comes, move.goes)


class Crossing:
    """A layer's experts, of which some come over the bus: for a step of many tokens, or to stay.

    In such a step an expert comes when it is its turn, as it lies in the CPU's memory, and is let go of. How many do,
    `Sides.split` says. Each kernel has its experts in a list, with () for those of the other.
    """

    def __init__(
        self,
        card: GluExpertKernel,
        here: list[Packed],
        cpu: GluExpertKernel,
        away: list[Packed],
        bus: Bus,
        used: list[int],
    ) -> None:
        self.card, self.cpu, self.bus = card, cpu, bus
        self.here, self.away, self.used = here, away, used

    def count(self, expert_ids: Tensor) -> None:
        """Of a step of decoding, in the CPU's memory."""
        for expert in expert_ids.flatten().tolist():
            self.used[expert] += 1

    def swap(self, comes: int, goes: int) -> None:
        """Let an expert of the CPU's and one of the card's change places."""
        stored = cast(QuantizedExpert, self.card.stored(self.here[goes]))
        gone, came = self.cpu.load(stored), self._bring(comes)
        self.bus.weights += _nbytes(stored)
        self.here[goes], self.away[goes] = (), gone
        self.here[comes], self.away[comes] = came, ()

    def split(self, x: Tensor, expert_ids: Tensor) -> tuple[list[int], list[int]]:
        """Of the CPU's experts that are chosen, those that come and those that stay; waits for the card to count."""
        counts = expert_ids.flatten().bincount(minlength=len(self.here)).tolist()
        self.bus.sides = self.bus.sides or self._measure(x)
        waiting = {i: tokens for i, tokens in enumerate(counts) if tokens and self.away[i]}
        coming, _ = self.bus.sides.split(waiting, [counts[i] for i, packed in enumerate(self.here) if packed])
        return coming, [i for i in waiting if i not in coming]

    def compute(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor, staying: Sequence[int]) -> Tensor:
        """As `HybridExperts.forward`, where all of the CPU's experts come that do not stay."""
        answer = None
        if staying:
            held = self.cpu.stack([packed if i in staying else () for i, packed in enumerate(self.away)])
            answer = self.bus.compute(partial(self.cpu.forward, held=held), x, expert_ids.int(), router_weights)
        out = moe_forward(self.card, self._fetch, len(self.here), x, expert_ids, router_weights, staying)
        return out if answer is None else out + answer()

    def _fetch(self, experts: Sequence[int]) -> Iterator[tuple[int, Packed]]:
        return ((expert, self.here[expert] or self._bring(expert)) for expert in experts)

    def _bring(self, expert: int) -> Packed:
        """An expert of the CPU's, on the card."""
        stored = cast(QuantizedExpert, self.cpu.stored(self.away[expert]))
        self.bus.weights += _nbytes(stored)
        return self.card.load(stored)

    def _measure(self, x: Tensor) -> Sides:
        """Of one of the CPU's experts."""
        expert = next(i for i, packed in enumerate(self.away) if packed)
        packed = self._bring(expert)
        rows = x[:1].expand(MANY, -1).contiguous()
        bus = _seconds(x.device, lambda: self._bring(expert))
        self.bus.weights = 0  # those were not asked for
        cpu, card = partial(_expert, self.cpu, self.away[expert], rows.cpu()), partial(_expert, self.card, packed, rows)
        return Sides(_side(cpu), _side(card), bus, cpu(1) - card(1))


def _nbytes(stored: QuantizedExpert) -> int:
    return sum(part.nbytes for part in chain(*stored) if part is not None)


def _expert(kernel: GluExpertKernel, packed: Packed, x: Tensor, tokens: int) -> float:
    """Seconds of an expert for so many tokens."""
    return _seconds(x.device, lambda: kernel.run(kernel.prepare(x[:tokens]), None, packed))


def _side(expert: Callable[[int], float]) -> Side:
    few, many = expert(FEW), expert(MANY)
    token = max(0.0, (many - few) / (MANY - FEW))
    return Side(max(0.0, few - FEW * token), token)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The least of some rounds: the first of a kernel may compile it."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


class HybridExperts(nn.Module):
    """A layer's experts on the card and on the CPU; the four that a token chose may be in both."""

    def __init__(
        self, on_card: nn.Module | None, on_cpu: nn.Module, bus: Bus, crossing: Crossing | None = None
    ) -> None:
        super().__init__()
        self.on_card = on_card
        self.on_cpu = on_cpu
        self.bus = bus
        self.crossing = crossing

    def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
        """x [n, d_model], expert_ids and router_weights [n, top_k] -> [n, d_model], the weighted sum."""
        if self.crossing is not None and len(x) > SHORT:
            coming, staying = self.crossing.split(x, expert_ids)
            if coming:
                return self.crossing.compute(x, expert_ids, router_weights, staying)
        away = self.bus.compute(self._away, x, expert_ids.int(), router_weights)
        if self.on_card is None:
            return away()
        here: Tensor = self.on_card(x, expert_ids, router_weights)
        return here + away()

    def _away(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
        """On the bus's thread, where the ids are at hand: to count them, no card is waited for."""
        if self.crossing is not None and len(x) <= SHORT:
            self.crossing.count(expert_ids)
        out: Tensor = self.on_cpu(x, expert_ids, router_weights)
        return out

    def swap(self, comes: int, goes: int) -> None:
        """Let an expert of the CPU's and one of the card's change places; nothing is changed where memory runs out."""
        crossing, on_card, on_cpu = self.crossing, cast(PackedExperts, self.on_card), cast(PackedExperts, self.on_cpu)
        assert crossing is not None
        crossing.swap(comes, goes)
        on_card.held, on_cpu.held = crossing.card.stack(crossing.here), crossing.cpu.stack(crossing.away)
