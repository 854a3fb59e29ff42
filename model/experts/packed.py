"""Experts that were packed for a kernel: all of a layer in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..kernels import GluExpertKernel, Packed

if TYPE_CHECKING:
    from ..weights import Weights


class PackedExperts(nn.Module):
    """A layer's experts as their kernel holds them. They are no parameters: nothing can save or move them."""

    def __init__(self, kernel: GluExpertKernel, experts: Sequence[Packed]) -> None:
        super().__init__()
        self.kernel = kernel
        self.held = kernel.stack(experts)

    def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
        """x [n, d_model], expert_ids and router_weights [n, top_k] -> [n, d_model], the weighted sum."""
        return self.kernel.forward(x, expert_ids, router_weights, self.held)


def packed_expert(
    kernel: GluExpertKernel, weights: Weights, layer: int, expert: int, data: tuple[Tensor, ...] | None = None
) -> Packed:
    """One expert as `kernel` wants it, however `weights` store it; `data` as in `Weights.expert`."""
    if kernel.quantization == "none":
        return kernel.pack(weights.expert(layer, expert, data))
    if weights.quantization == kernel.quantization:
        return kernel.load(weights.quantized_expert(layer, expert, data))
    stored = kernel.quantize(weights.expert(layer, expert, data))
    del data  # the floats, which may be large, are done with
    return kernel.load(stored)
