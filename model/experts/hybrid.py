"""Experts in two places, a card and the CPU's memory: each computes where it lies, at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


class Bus:
    """Between a card and the CPU, which computes on a thread of its own; what crosses is counted.

    Weights never do: a layer sends its activations down and gets their sums. Only that thread waits for the card.
    """

    def __init__(self, card: torch.device) -> None:
        self.card = card
        self.down = self.up = 0  # bytes
        self._thread = ThreadPoolExecutor(1, "cpu-experts")

    def compute(self, work: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Tensor]:
        """Begin `work` on the CPU with copies of the card's tensors; gives what waits for its answer, on the card."""
        is_card = self.card.type == "cuda"
        sent = [torch.empty(each.shape, dtype=each.dtype, pin_memory=is_card) for each in inputs]
        for to, of in zip(sent, inputs, strict=True):
            to.copy_(of, non_blocking=is_card)
            self.down += of.nbytes
        arrived = torch.cuda.current_stream(self.card).record_event() if is_card else None

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
            return out.to(self.card, non_blocking=True)

        return answer


class HybridExperts(nn.Module):
    """A layer's experts on the card and on the CPU; the four that a token chose may be in both."""

    def __init__(self, on_card: nn.Module | None, on_cpu: nn.Module, bus: Bus) -> None:
        super().__init__()
        self.on_card = on_card
        self.on_cpu = on_cpu
        self.bus = bus

    def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
        """x [n, d_model], expert_ids and router_weights [n, top_k] -> [n, d_model], the weighted sum."""
        away = self.bus.compute(self.on_cpu, x, expert_ids.int(), router_weights)
        if self.on_card is None:
            return away()
        here: Tensor = self.on_card(x, expert_ids, router_weights)
        return here + away()
