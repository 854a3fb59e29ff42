"""Experts that were packed for a kernel: all of a layer in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock

from torch import Tensor, nn

from .kernel import Kernel, Packed, mix


class PackedExperts(nn.Module):
    """A layer's experts as their kernel holds them. They are no parameters: nothing can save or move them."""

    def __init__(self, kernel: Kernel, experts: Sequence[Packed]) -> None:
        super().__init__()
        self.kernel = kernel
        self.experts = list(experts)
        self.stacked: list[Tensor] = []
        self._lock = Lock()

    def stack(self, i: int, packed: Packed) -> None:
        """Keep expert i of a kernel that holds plain tensors: each becomes row i of one in `stacked`."""
        with self._lock:
            if not self.stacked:
                tensors = (part for matrix in packed for part in matrix)
                self.stacked = [part.new_empty(len(self.experts), *part.shape) for part in tensors]
        places = iter(self.stacked)
        self.experts[i] = tuple(tuple(next(places)[i].copy_(part) for part in matrix) for matrix in packed)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [n, d_model], chosen [n, top_k] ids, weights [n, top_k] -> [n, d_model], the weighted sum."""
        if len(x) == 1:  # a decode step: nothing to sort or gather, and nothing to wait for
            return weights @ self.kernel.each(x, [self.experts[expert] for expert in chosen[0].tolist()])
        return mix(self.kernel, self._fetch, len(self.experts), x, chosen, weights)

    def _fetch(self, experts: Sequence[int]) -> Iterator[tuple[int, Packed]]:
        return ((expert, self.experts[expert]) for expert in experts)
