"""How far a network in few bits is from the one that it was made from, on a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kv_cache import KVCache
from .sequence import finite

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

CHUNK = 128  # positions whose logits are held at once


@dataclass(frozen=True)
class Quality:
    """Against the reference, a mean over positions: divergence in nats, share of equal likeliest tokens."""

    tokens: int
    kl_nats: float
    top1: float
    perplexity: float
    reference_perplexity: float


@torch.inference_mode()
def log_probabilities(network: DbrxForCausalLM, ids: Sequence[int], chunk: int = CHUNK) -> Tensor:
    """Of every token after each position: [len(ids), vocab] float32. Read so many at a time; one as decoding does."""
    cache = KVCache(network.config.n_layers)
    parts = torch.split(torch.tensor([list(ids)], device=network.device), chunk, dim=1)
    logits = (network(part, past_key_values=cache).logits[0] for part in parts)
    return torch.cat([finite(part.float()).log_softmax(-1).cpu() for part in logits])


@torch.inference_mode()
def compare(network: DbrxForCausalLM, reference: Tensor, ids: Sequence[int], chunk: int = CHUNK) -> Quality:
    """A network against what `log_probabilities` gave for the whole one on the same ids."""
    ours = log_probabilities(network, ids, chunk)
    following = torch.tensor(ids)[1:, None]
    losses = [-table[:-1].gather(1, following).mean() for table in (ours, reference)]
    divergence = [(theirs.exp() * (theirs - our)).sum(-1) for our, theirs in zip(ours, reference, strict=True)]
    return Quality(
        tokens=len(ids),
        kl_nats=float(torch.stack(divergence).mean()),
        top1=float((ours.argmax(-1) == reference.argmax(-1)).float().mean()),
        perplexity=float(losses[0].exp()),
        reference_perplexity=float(losses[1].exp()),
    )
