"""A choice: how attention is computed. `choose` takes a name, or the first that can run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ModelError
from . import eager, flash, sdpa
from .plan import AttentionPlan

__all__ = ["BACKENDS", "Attend", "AttentionPlan", "choose"]


class Attend(Protocol):
    """Attention of one step over all keys so far."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, plan: AttentionPlan) -> Tensor:
        """q [batch, seq, n_heads, head_dim]; k, v [batch, kv_len, kv_heads, head_dim] -> like q."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention; `unavailable` gives the reason why it cannot run there, or None."""

    build: Callable[[], Attend]
    unavailable: Callable[[torch.device, torch.dtype], str | None]


# In order of preference: `auto` takes the first that is available.
BACKENDS = {
    "flash": Backend(flash.build, flash.unavailable),
    "sdpa": Backend(sdpa.build, sdpa.unavailable),
    "eager": Backend(eager.build, eager.unavailable),
}
ALIASES = {"flash_attention_2": "flash"}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Attend]:
    """The backend's name and its function; `ModelError` with the reason if it cannot run on that device."""
    name = ALIASES.get(name, name)
    if name == "auto":
        name = next(n for n, backend in BACKENDS.items() if backend.unavailable(device, dtype) is None)
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r} is not one of auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable(device, dtype)
    if reason:
        raise ModelError(f"attention {name!r} cannot run here: {reason}", "choose --attn sdpa, or auto")
    return name, BACKENDS[name].build()
