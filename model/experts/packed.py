"""Experts that were packed for a kernel: all of a layer in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from .kernel import Kernel, Packed, mix


class PackedExperts(nn.Module):
    """A layer's experts as their kernel holds them. They are no parameters: nothing can save or move them."""

    def __init__(self, kernel: Kernel, experts: Sequence[Packed]) -> None:
        super().__init__()
        self.kernel = kernel
        self.experts = list(experts)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [n, d_model], chosen [n, top_k] ids, weights [n, top_k] -> [n, d_model], the weighted sum."""
        if len(x) == 1:  # a decode step: nothing to sort or gather, and nothing to wait for
            return weights @ self.kernel.each(x, [self.experts[expert] for expert in chosen[0].tolist()])
        return mix(self.kernel, self._fetch, len(self.experts), x, chosen, weights)

    def _fetch(self, experts: Sequence[int]) -> Iterator[tuple[int, Packed]]:
        return ((expert, self.experts[expert]) for expert in experts)
