"""Experts that lie on disk, or in the CPU's memory beside a GPU, and come when the router has chosen them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels import FloatGlu, GluExpertKernel, Packed
from ..kernels.dispatch import moe_forward
from ..load_layout import READING_AHEAD
from ..streaming import DiskSource, ExpertStore, HostSource, Pack, Source, make_slots, slot_size
from ..weights import FloatExpert
from .packed import packed_expert

if TYPE_CHECKING:
    from ..weights import Weights


class StreamedExperts(nn.Module):
    """One layer's view of the store. It has no parameters: placing and saving do not see the experts."""

    def __init__(self, store: ExpertStore, layer: int, kernel: GluExpertKernel, n_experts: int) -> None:
        super().__init__()
        self.store = store
        self.layer = layer
        self.kernel = kernel
        self.n_experts = n_experts

    def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
        """x [n, d_model], expert_ids and router_weights [n, top_k] -> [n, d_model], the weighted sum."""
        return moe_forward(self.kernel, self._fetch, self.n_experts, x, expert_ids, router_weights)

    def _fetch(self, experts: Sequence[int]) -> Iterator[tuple[int, Packed]]:
        return self.store.fetch(self.layer, experts)


def open_store(
    weights: Weights,
    kernel: GluExpertKernel,
    dtype: torch.dtype,
    device: torch.device,
    capacity: int,
    *,
    host: bool = False,
) -> ExpertStore:
    """A store for all experts of `weights`, computing on `device` in `dtype` with `kernel`.

    They stay in their files, or with `host` in the CPU's memory. `capacity`: experts that are held, at least two: one
    that computes, and the next one on its way.
    """
    config = weights.config
    layers, ids = range(config.n_layers), range(config.ffn_config.moe_num_experts)
    extents = [[weights.expert_extents(layer, expert) for expert in ids] for layer in layers]
    every = [expert for layer in extents for expert in layer]
    slot = slot_size(every)
    same = weights.plain_experts if kernel.quantization == "none" else kernel.quantization == weights.quantization
    in_place = kernel.reads_stored and same
    pack: Pack
    if in_place and not isinstance(kernel, FloatGlu):
        pack = partial(packed_expert, kernel, weights)
    elif in_place:
        pack = InPlace(weights, dtype, device)
    else:
        pack = PackOnArrival(weights, kernel, dtype, device)
    slots = make_slots(capacity, slot, device) if in_place else make_slots(READING_AHEAD, slot, torch.device("cpu"))
    folder = weights.source if weights.source.is_dir() else weights.source.parent
    source: Source = HostSource(folder, every, device) if host else DiskSource(folder)
    return ExpertStore(source, extents, slots, pack, capacity=capacity, in_place=in_place)


class InPlace:
    """Computes with the stored bytes themselves; numbers of another type are cast at each use, to the same place."""

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._cast: list[Tensor] = []

    def __call__(self, layer: int, expert: int, data: tuple[Tensor, ...]) -> Packed:
        floats = self._weights.expert(layer, expert, data)
        if all(matrix.dtype == self._dtype for matrix in floats):
            return tuple(floats)
        if not self._cast:
            self._cast = [torch.empty(matrix.shape, dtype=self._dtype, device=self._device) for matrix in floats]
        for to, stored in zip(self._cast, floats, strict=True):
            to.copy_(stored)
        return tuple(self._cast)


class PackOnArrival:
    """Makes of the stored bytes what the kernel wants, in memory of its own."""

    def __init__(self, weights: Weights, kernel: GluExpertKernel, dtype: torch.dtype, device: torch.device) -> None:
        self._weights = weights
        self._kernel = kernel
        self._dtype = dtype
        self._device = device

    def __call__(self, layer: int, expert: int, data: tuple[Tensor, ...]) -> Packed:
        # What is made in inference mode belongs to the thread that does, and formats unpack on several.
        with torch.inference_mode(False), torch.no_grad():
            if self._kernel.quantization != "none":
                return packed_expert(self._kernel, self._weights, layer, expert, data)
            floats = self._weights.expert(layer, expert, data)
            owned = (matrix.to(self._device, self._dtype, copy=True) for matrix in floats)
            return self._kernel.pack(FloatExpert(*owned))
