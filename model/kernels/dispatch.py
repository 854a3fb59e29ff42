"""The seam between routing and arithmetic: each chosen expert gets its rows, and what they give is added up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import GluExpertKernel, Packed

if TYPE_CHECKING:
    from ..weights import QuantizedExpert

# A layer's source of packed experts: gives each that is asked for, with its id, in the order in which they are at hand.
Fetch = Callable[[Sequence[int]], Iterable[tuple[int, Packed]]]


class Dispatched:
    """`stack` and `forward` of kernels that compute one expert after the other; of these none keeps what is stored."""

    def stored(self, packed: Packed) -> QuantizedExpert | None:
        return None

    def stack(self, experts: Sequence[Packed]) -> list[Packed]:
        return list(experts)

    def forward(
        self: GluExpertKernel, x: Tensor, expert_ids: Tensor, router_weights: Tensor, held: list[Packed]
    ) -> Tensor:
        absent = [expert for expert, packed in enumerate(held) if not packed]
        if len(x) == 1 and not absent:  # a decode step: nothing to sort or gather, and nothing to wait for
            return router_weights @ self.each(x, [held[expert] for expert in expert_ids[0].tolist()])

        def fetch(experts: Sequence[int]) -> Iterator[tuple[int, Packed]]:
            return ((expert, held[expert]) for expert in experts)

        return moe_forward(self, fetch, len(held), x, expert_ids, router_weights, absent)


def moe_forward(
    kernel: GluExpertKernel,
    fetch: Fetch,
    n_experts: int,
    x: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    absent: Sequence[int] = (),
) -> Tensor:
    """x [n, d_model], expert_ids and router_weights [n, top_k] -> [n, d_model], the weighted sum of experts' outputs.

    Each expert computes when `fetch` gives it; what they give is added in an order of its own, so that the sum is the
    same wherever they come from. Those that are `absent` add nothing.
    """
    if len(x) == 1 and not absent:  # a decode step: nothing to sort or gather
        ids = expert_ids[0].tolist()
        outputs = {expert: kernel.each(x, [packed]) for expert, packed in fetch(ids)}
        return router_weights @ torch.cat([outputs[expert] for expert in ids])
    prepared = kernel.prepare(x)
    out = torch.zeros_like(x)
    jobs = {expert: job for expert, job in _jobs(n_experts, expert_ids, router_weights) if expert not in absent}
    done: dict[int, Tensor] = {}
    waiting = deque(jobs)
    for expert, packed in fetch(list(jobs)):
        rows, weight = jobs[expert]
        done[expert] = kernel.run(prepared, rows, packed) * weight
        while waiting and waiting[0] in done:
            first = waiting.popleft()
            rows = jobs[first][0]
            if rows is None:
                out += done.pop(first)
            else:
                out.index_add_(0, rows, done.pop(first))
    return out


def _jobs(
    n_experts: int, expert_ids: Tensor, router_weights: Tensor
) -> Iterator[tuple[int, tuple[Tensor | None, Tensor]]]:
    """The chosen experts, ascending, with the rows of x that each computes (None: all) and their weights."""
    ids = expert_ids.flatten()
    places = torch.split(ids.argsort(stable=True), ids.bincount(minlength=n_experts).tolist())
    for expert, which in enumerate(places):
        if len(which):
            rows = which // expert_ids.shape[1] if len(which) < len(expert_ids) else None
            yield expert, (rows, router_weights.flatten()[which, None])
