"""DBRX in vLLM: a plugin (entry point `vllm.general_plugins`) with a configuration and a network of its own.

vLLM's own DBRX cannot load its experts (0.32.0 and 0.33.0), and vLLM drops architectures that nobody mends. Nothing of
vLLM's file is used, so it may go. It must be installed in vLLM's environment, without dependencies: docs/scale.md.
"""

from __future__ import annotations


def register() -> None:
    """What vLLM calls in each of its processes, maybe several times."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from .config import DbrxConfig

    AutoConfig.register(DbrxConfig.model_type, DbrxConfig, exist_ok=True)
    # By name: importing the network here would start CUDA before vLLM forks.
    ModelRegistry.register_model("DbrxForCausalLM", f"{__name__}.network:DbrxForCausalLM")
