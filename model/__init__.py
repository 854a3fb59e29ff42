"""DBRX, the network and all it needs to turn messages into text: no terminal, no command line."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM
    from .config import DbrxConfig
    from .kv_cache import KVCache
    from .messages import Message
    from .sampling import SamplingParams
    from .tokenizer import AutoTokenizer
    from .transformer import DbrxModel

__all__ = ["AutoTokenizer", "DbrxConfig", "DbrxForCausalLM", "DbrxModel", "KVCache", "Message", "SamplingParams"]

# Loaded on first use (PEP 562), so that a command that needs no network starts without torch.
_HOME = {
    "AutoTokenizer": "tokenizer",
    "DbrxConfig": "config",
    "DbrxForCausalLM": "causal_lm",
    "DbrxModel": "transformer",
    "KVCache": "kv_cache",
    "Message": "messages",
    "SamplingParams": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
