"""What the network returns: fields by name, or the non-empty ones by position, as transformers does."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .kv_cache import KVCache


@dataclass
class ModelOutput:
    """Base of the outputs: `output.logits`, `output["logits"]`, `output[0]`, `output.to_tuple()`."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(value for f in fields(self) if (value := getattr(self, f.name)) is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class BaseOutput(ModelOutput):
    """Output of DbrxModel."""

    last_hidden_state: Tensor  # [batch, seq, d_model], after the last norm
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, each block's output, the last one normalised
    attentions: tuple[Tensor, ...] | None = None  # a layer: [batch, n_heads, seq, keys]
    router_logits: tuple[Tensor, ...] | None = None  # a layer: probabilities [batch * seq, experts]


@dataclass
class CausalLMOutput(ModelOutput):
    """Output of DbrxForCausalLM."""

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None  # [batch, kept, vocab]
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
