"""Experts whose weights lie in memory as the checkpoint stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..quantization.widened import linear, matmul
from .kernel import OneByOne, Packed, mix

if TYPE_CHECKING:
    from ..formats import FloatExpert


class FloatKernel(OneByOne):
    """Plain products in the weights' own type, on any device; in float32 where the processor has none for that type."""

    name = "float"
    quantization = "none"

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.activation = activation

    def pack(self, expert: FloatExpert) -> Packed:
        return tuple(expert)

    def quantize(self, expert: FloatExpert) -> NoReturn:
        raise ValueError("a kernel of floats quantizes no expert")

    def load(self, stored: Any) -> NoReturn:
        raise ValueError("a kernel of floats loads no quantized expert")

    def nbytes(self, hidden: int, d_model: int, itemsize: int) -> int:
        return 3 * hidden * d_model * itemsize

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def run(self, prepared: Tensor, rows: Tensor | None, packed: Packed) -> Tensor:
        w1, v1, w2 = packed
        x = prepared if rows is None else prepared[rows]
        return matmul(self.activation(linear(x, w1)) * linear(x, v1), w2)


class ExpertWeights(nn.Module):
    """All experts of a layer, stacked: w1, v1, w2 [experts * hidden, d_model] each (the checkpoint's `mlp`).

    w2 is stored untransposed: expert e's slice is [hidden, d_model], to be used as h @ w2.
    """

    def __init__(self, n_experts: int, hidden: int, d_model: int) -> None:
        super().__init__()
        for name in ("w1", "v1", "w2"):
            self.register_parameter(name, nn.Parameter(torch.empty(n_experts * hidden, d_model)))

    w1: nn.Parameter
    v1: nn.Parameter
    w2: nn.Parameter


class ResidentExperts(nn.Module):
    """Experts as views of the stacked parameters: no weight is copied."""

    def __init__(self, n_experts: int, hidden: int, d_model: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.kernel = FloatKernel(activation)
        self.mlp = ExpertWeights(n_experts, hidden, d_model)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [n, d_model], chosen [n, top_k] ids, weights [n, top_k] -> [n, d_model], the weighted sum."""
        return mix(self.kernel, self._fetch, self.n_experts, x, chosen, weights)

    def _fetch(self, experts: Sequence[int]) -> Iterator[tuple[int, Packed]]:
        w1, v1, w2 = (w.view(self.n_experts, -1, w.shape[1]) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        return ((expert, (w1[expert], v1[expert], w2[expert])) for expert in experts)
