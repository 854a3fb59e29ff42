"""Which experts the routers chose: recorded from a forward pass, and what follows from it for a cache of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

    from .causal_lm import DbrxForCausalLM
    from .moe import DbrxRouter

Ids = NDArray[np.int16]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """The routing of each token in each layer.

    expert_ids [layers, tokens, top_k]: the heaviest first; router_weights: like it, what each counts for.
    foreseen [layers - 1, tokens, top_k]: what a layer's router would choose for the state that the layer before it
    gave its own router, so before that layer's experts have computed.
    """

    ids: tuple[int, ...]
    expert_ids: Ids
    router_weights: NDArray[np.float32]
    foreseen: Ids
    n_experts: int  # a layer
    expert_bytes: int  # one expert, in the form that it is computed with

    @property
    def top_k(self) -> int:
        return int(self.expert_ids.shape[2])

    @property
    def n_layers(self) -> int:
        return int(self.expert_ids.shape[0])

    @property
    def chooses(self) -> bool:
        """False where every token uses every expert, so that there is nothing to choose."""
        return self.top_k < self.n_experts


def record(network: DbrxForCausalLM, ids: Sequence[int]) -> Trace:
    """Read ids through the network once, in a cache of its own, and keep what its routers say.

    `NotFiniteError` where its weights are damaged: routers choose for NaN, too.
    """
    import torch

    from .kv_cache import KVCache
    from .moe import DbrxRouter
    from .prefill import prefill
    from .sequence import finite

    with _listening([m for m in network.modules() if isinstance(m, DbrxRouter)]) as heard:
        cache = KVCache(network.config.n_layers)
        finite(prefill(network, torch.tensor([list(ids)], device=network.device), cache, whole=True).float())
    router_weights, expert_ids, foreseen = (
        torch.stack([torch.cat([said[part] for said in layer]) for layer in heard]) for part in range(3)
    )
    return Trace(
        tuple(ids),
        expert_ids.numpy().astype(np.int16),
        router_weights.float().numpy(),
        foreseen.numpy()[:-1].astype(np.int16),
        network.config.ffn_config.moe_num_experts,
        network.expert_bytes,
    )


@contextmanager
def _listening(routers: Sequence[DbrxRouter]) -> Iterator[list[list[tuple[Any, Any, Any]]]]:
    """A list a router; each call adds (router_weights, expert_ids, what the next router would choose), on the CPU.

    The last router has no next one: it is asked itself.
    """
    heard: list[list[tuple[Any, Any, Any]]] = [[] for _ in routers]

    def listen(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        following = routers[min(layer + 1, len(routers) - 1)]

        def hear(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            (x,) = given
            foreseen = following.forward(x.to(following.layer.weight.device))[2]  # not a call: its hook would hear it
            heard[layer].append((out[1].cpu(), out[2].cpu(), foreseen.cpu()))

        return hear

    hooks = [router.register_forward_hook(listen(layer)) for layer, router in enumerate(routers)]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def counts(trace: Trace) -> NDArray[np.int64]:
    """[layers, experts]: how many tokens chose an expert."""
    return np.stack([np.bincount(layer.ravel(), minlength=trace.n_experts) for layer in trace.expert_ids])


def usage(trace: Trace) -> Floats:
    """[layers, experts]: the share of tokens that chose an expert. Each row sums to top_k."""
    shares: Floats = counts(trace) / trace.expert_ids.shape[1]
    return shares


def entropy(shares: Floats) -> Floats:
    """Bits of each row, taken as a distribution: log2(experts) if all are used alike, log2(top_k) at the least."""
    p = shares / shares.sum(-1, keepdims=True)
    bits: Floats = -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)
    return bits


def reuse(expert_ids: Ids) -> Floats:
    """[layers]: the share of a token's experts that the token before it chose, too; 0 for a single token.

    By chance it would be top_k / experts.
    """
    if expert_ids.shape[1] < 2:
        return np.zeros(len(expert_ids))
    return _in_common(expert_ids[:, :-1], expert_ids[:, 1:])


def lookahead(trace: Trace) -> Floats:
    """[layers - 1]: the share of the experts of layer 1, 2, ... that were foreseen a layer before.

    By chance it would be top_k / experts. A cache that reads ahead by such a guess would find so many.
    """
    return _in_common(trace.foreseen, trace.expert_ids[1:])


def _in_common(a: Ids, b: Ids) -> Floats:
    """[layers]: of two choices [layers, tokens, top_k], the share of experts that are in both."""
    shares: Floats = (a[..., :, None] == b[..., None, :]).any(-1).mean((1, 2))
    return shares


def hit_rates(requests: Iterable[int], n_experts: int) -> Floats:
    """[n_experts + 1]: the share of requests that a cache of 0, 1, ... experts answers, if it drops the least recent.

    The first request of an expert is a miss at every size. One pass gives all sizes (stack distances: Mattson et al.
    1970, "Evaluation techniques for storage hierarchies").
    """
    recent: list[int] = []  # the last used at the end
    hits = np.zeros(n_experts + 1)
    total = 0
    for expert in requests:
        total += 1
        if expert in recent:
            place = recent.index(expert)
            hits[len(recent) - place] += 1  # the smallest cache that still holds it
            del recent[place]
        recent.append(expert)
    return hits.cumsum() / max(total, 1)


def layer_hit_rates(trace: Trace) -> Floats:
    """[layers, experts + 1]: `hit_rates` of a cache for each layer."""
    return np.stack([hit_rates(layer.ravel().tolist(), trace.n_experts) for layer in trace.expert_ids])


def whole_hit_rates(trace: Trace) -> Floats:
    """[layers * experts + 1]: `hit_rates` of one cache that all layers share, asked token by token, layer by layer."""
    offsets = np.arange(trace.n_layers)[:, None, None] * trace.n_experts
    order = (trace.expert_ids + offsets).transpose(1, 0, 2)
    return hit_rates(order.ravel().tolist(), trace.n_layers * trace.n_experts)
