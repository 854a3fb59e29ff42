"""Experts in two places, a card and the CPU's memory: each computes where it lies, at the same time.

But in a step of many tokens, where those of the CPU that most tokens chose come to the card (`LongSteps`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels import GluExpertKernel, Packed
from ..kernels.dispatch import moe_forward
from ..speed import Side, Sides
from ..weights import QuantizedExpert

SHORT = 8  # tokens of a step in which no weight crosses: one of decoding
FEW, MANY, ROUNDS = 16, 128, 2  # tokens for which an expert is timed, and how often


class Bus:
    """Between cards and the CPU, which computes on a thread of its own; what crosses is counted.

    A layer sends its activations down and gets their sums. Only that thread waits for a card.
    """

    def __init__(self) -> None:
        self.down = self.up = self.weights = 0  # bytes: activations, sums, and experts in long steps
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


class LongSteps:
    """A layer's experts where a step has many tokens.

    An expert that comes over the bus does so when it is its turn, as it lies in the CPU's memory, and is let go of. How
    many do, `Sides.split` says. Each kernel has its experts in a list, with () for those of the other.
    """

    def __init__(
        self, card: GluExpertKernel, here: Sequence[Packed], cpu: GluExpertKernel, away: Sequence[Packed], bus: Bus
    ) -> None:
        self.card, self.cpu, self.bus = card, cpu, bus
        self.here, self.away = here, away

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
        self.bus.weights += sum(part.nbytes for part in chain(*stored) if part is not None)
        return self.card.load(stored)

    def _measure(self, x: Tensor) -> Sides:
        """Of one of the CPU's experts."""
        expert = next(i for i, packed in enumerate(self.away) if packed)
        packed = self._bring(expert)
        rows = x[:1].expand(MANY, -1).contiguous()
        bus = _seconds(x.device, lambda: self._bring(expert))
        self.bus.weights = 0  # those were not asked for
        return Sides(_side(self.cpu, self.away[expert], rows.cpu()), _side(self.card, packed, rows), bus)


def _side(kernel: GluExpertKernel, packed: Packed, x: Tensor) -> Side:
    def run(tokens: int) -> float:
        return _seconds(x.device, lambda: kernel.run(kernel.prepare(x[:tokens]), None, packed))

    few, many = run(FEW), run(MANY)
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

    def __init__(self, on_card: nn.Module | None, on_cpu: nn.Module, bus: Bus, long: LongSteps | None = None) -> None:
        super().__init__()
        self.on_card = on_card
        self.on_cpu = on_cpu
        self.bus = bus
        self.long = long

    def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
        """x [n, d_model], expert_ids and router_weights [n, top_k] -> [n, d_model], the weighted sum."""
        if self.long is not None and len(x) > SHORT:
            coming, staying = self.long.split(x, expert_ids)
            if coming:
                return self.long.compute(x, expert_ids, router_weights, staying)
        away = self.bus.compute(self.on_cpu, x, expert_ids.int(), router_weights)
        if self.on_card is None:
            return away()
        here: Tensor = self.on_card(x, expert_ids, router_weights)
        return here + away()
