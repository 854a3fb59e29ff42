"""A network whose experts are streamed: how it comes to do so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .experts.streamed import StreamedExperts, open_store
from .kernels import streamed_experts_of

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM
    from .load_plan import LoadPlan
    from .packing import KernelChoice
    from .weights import Weights


def strip_experts(network: DbrxForCausalLM) -> None:
    """Leave the experts' parameters out of a network, before it is placed and read."""
    for block in network.transformer.blocks:
        block.get_submodule("ffn").experts = torch.nn.Identity()


def stream_experts(network: DbrxForCausalLM, weights: Weights, plan: LoadPlan, kernels: KernelChoice | None) -> None:
    """Give a network whose other weights are read the experts of `weights`, as many in memory as the plan says.

    They are packed if they are quantized on their way. Else they compute as they were read, where a kernel can.
    """
    config = network.config
    experts = kernels.experts if kernels is not None else None
    kernel = streamed_experts_of(experts, str(config.ffn_config.activation), weights.quantization)
    dtype = getattr(torch, plan.kv_dtype)  # of floats that are not quantized
    store = open_store(weights, kernel, dtype, network.device, plan.kept, host=plan.offload == "cpu")
    for layer, block in enumerate(network.transformer.blocks):
        block.get_submodule("ffn").experts = StreamedExperts(store, layer, kernel, config.ffn_config.moe_num_experts)
    network.expert_store = store
