"""Models larger than memory: whether the experts are streamed, from where, and how a network comes to do it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Literal, cast

import torch

from .devices import AUTOMATIC, DeviceMap, too_large
from .errors import ModelError
from .experts.streamed import StreamedExperts, open_store
from .kernels import streamed_experts_of
from .machine import available_memory, parse_size

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM
    from .packing import Packing
    from .weights import Weights

Offload = Literal["auto", "none", "cpu", "disk"]
CHUNK = 2048  # tokens a step of prefill: it reads nearly all experts of each layer, however few its tokens are
FITS = 0.9  # of the free memory, for weights that stay


def decide(
    wanted: str,
    network: DbrxForCausalLM,
    dtype: torch.dtype,
    packing: Packing | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    *,
    on_gpu: bool,
) -> Offload:
    """none, cpu or disk for a network that is not loaded yet; `wanted` may be auto.

    Where the CPU computes, experts in its memory are resident. With `on_gpu`, accelerate places what fits.
    """
    if wanted not in ("auto", "none", "cpu", "disk"):
        raise ValueError(f"offload {wanted!r} is not one of auto, none, cpu, disk")
    if wanted == "cpu" and not on_gpu:
        wanted = "none"
    if on_gpu:
        return cast(Offload, "none" if wanted == "auto" else wanted)
    quantized = packing is not None and packing.quantize != "none"
    ffn, itemsize = network.config.ffn_config, 2 if quantized else dtype.itemsize
    experts = network.config.n_layers * ffn.moe_num_experts
    matrix = ffn.ffn_hidden_size, network.config.d_model
    dense = (sum(p.numel() for p in network.parameters()) - experts * 3 * prod(matrix)) * itemsize
    expert = packing.experts.nbytes(*matrix, itemsize) if packing is not None else 3 * prod(matrix) * itemsize
    whole, least = dense + experts * expert, dense + 2 * expert
    free = available_memory()
    if max_memory and "cpu" in max_memory:
        allowed = parse_size(str(max_memory["cpu"]))
        if (whole if wanted == "none" else least) > allowed:
            raise too_large(whole, packing.quantize if packing and quantized else str(dtype).removeprefix("torch."))
        free = min(free, allowed)
    if wanted != "auto":
        return cast(Offload, wanted)
    # What fits in no way is tried all the same: pages of a mapped file can give way.
    return "disk" if least <= free * FITS < whole else "none"


def one_device(device_map: str | int | torch.device | DeviceMap | None) -> str | int | torch.device | DeviceMap | None:
    """A device map for a network whose experts are streamed: what stays goes to one device."""
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return device_map


def take_out_experts(network: DbrxForCausalLM) -> None:
    """Leave the experts' parameters out of a network, before it is placed and read."""
    for block in network.transformer.blocks:
        block.get_submodule("ffn").experts = torch.nn.Identity()


def stream_experts(
    network: DbrxForCausalLM,
    weights: Weights,
    dtype: torch.dtype,
    packing: Packing | None = None,
    *,
    host: bool = False,
    budget: int | None = None,
) -> None:
    """Give a network whose other weights are read the experts of `weights`; see `open_store`.

    They are packed if they are quantized on their way. Else they compute as they were read, where a kernel can.
    """
    devices = {parameter.device for parameter in network.parameters()}
    if len(devices) > 1:
        listed = ", ".join(sorted(map(str, devices)))
        raise ModelError(f"streamed experts compute on one device, not on {listed}", "give --device-map one device")
    config = network.config
    experts = packing.experts if packing is not None else None
    kernel = streamed_experts_of(experts, str(config.ffn_config.activation), weights.quantization)
    store = open_store(weights, kernel, dtype, devices.pop(), host=host, budget=budget)
    for layer, block in enumerate(network.transformer.blocks):
        block.get_submodule("ffn").experts = StreamedExperts(store, layer, kernel, config.ffn_config.moe_num_experts)
    network.expert_store = store
    network.prefill_chunk = CHUNK
