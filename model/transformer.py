"""The network without its head: embedding, blocks of attention and experts, norm.

Parameters are named as in the checkpoint. Inference is what this code is for: dropout and router jitter, which
only act in training, are not applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .attention import Attend, AttentionPlan, choose
from .attention.eager import EagerAttention
from .config import DbrxConfig
from .kv_cache import KVCache
from .moe import DbrxFFN
from .outputs import BaseOutput
from .rope import rotary_rows, rotary_table, rotate

EPS = 1e-5  # of every LayerNorm


@dataclass(frozen=True)
class Step:
    """What all blocks of one forward pass share."""

    plan: AttentionPlan
    attend: Attend
    cache: KVCache | None
    want_attentions: bool
    keeps_hidden: bool  # the residual stream between blocks is looked at: none may write into it
    last_only: bool  # the last block's output is wanted of the last position alone


class AllBlocks(Protocol):
    """Computes a step of all blocks at once."""

    runs_ahead: bool  # it asks for no number, so the next step may begin before this one is over

    def takes(self, step: Step) -> bool:
        """Whether it can."""

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """Write the new residual stream to x [batch, seq, d_model]; router probabilities [blocks, rows, experts]."""


class DbrxAttention(nn.Module):
    """Grouped-query attention with one fused projection and rotary positions."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.clip = config.attn_config.clip_qkv
        self.heads = [config.n_heads, config.attn_config.kv_n_heads, config.attn_config.kv_n_heads]
        self.kv_dtype: torch.dtype | None = None  # in which keys and values are cached; None: as they are computed
        self.Wqkv = nn.Linear(config.d_model, sum(self.heads) * self.head_dim, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """x [batch, seq, d_model] -> the same shape, and the attention weights if they are wanted."""
        qkv = self.Wqkv(x)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        qk, v = torch.split(heads, [self.heads[0] + self.heads[1], self.heads[2]], dim=-2)
        q, k = torch.split(rotate(qk, cos, sin), self.heads[:2], dim=-2)
        plan = step.plan
        if step.cache is not None:
            kept = self.kv_dtype or q.dtype
            k, v = (part.to(q.dtype) for part in step.cache.append(self.layer, k.to(kept), v.to(kept), plan))
        else:
            k, v = (plan.compact(part)[:, : plan.kv_len] for part in (k, v))
        weights = None
        scale = self.head_dim**-0.5
        if step.want_attentions:
            y, weights = EagerAttention().with_weights(q, k, v, scale=scale, plan=plan)
        else:
            y = step.attend(q, k, v, scale=scale, plan=plan)
        return self.out_proj(y.flatten(-2)), weights


class DbrxNormAttentionNorm(nn.Module):
    """The attention half of a block with the norms on both sides of it."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model, EPS, bias=False)
        self.attn = DbrxAttention(config, layer)
        self.norm_2 = nn.LayerNorm(config.d_model, EPS, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        """x -> the residual stream after attention, its norm for the experts, and attention weights or None."""
        y, weights = self.attn(self.norm_1(x), cos, sin, step)
        x = x + y
        return x, self.norm_2(x), weights


class DbrxBlock(nn.Module):
    """One layer: x + attention(norm_1(x)), then x + experts(norm_2(x))."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.is_last = layer == config.n_layers - 1
        self.norm_attn_norm = DbrxNormAttentionNorm(config, layer)
        self.ffn = DbrxFFN(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [batch, seq, d_model] -> x, router probabilities [batch * seq, experts], attention weights or None."""
        x, normed, weights = self.norm_attn_norm(x, cos, sin, step)
        if step.last_only and self.is_last:  # its keys and values are kept; of its experts nobody reads more
            x, normed = x[:, -1:], normed[:, -1:]
        y, probabilities = self.ffn(normed)
        return x + y, probabilities, weights


class DbrxModel(nn.Module):
    """The network without its head: ids -> hidden states."""

    def __init__(self, config: DbrxConfig, attn_implementation: str = "auto") -> None:
        super().__init__()
        self.config = config
        # Given weights, since to draw some on the meta device PyTorch imports its compiler, which takes a second.
        empty = torch.empty(config.vocab_size, config.d_model)
        self.wte: nn.Module = nn.Embedding(config.vocab_size, config.d_model, _weight=empty)
        self.blocks = nn.ModuleList(DbrxBlock(config, i) for i in range(config.n_layers))
        self.norm_f = nn.LayerNorm(config.d_model, EPS, bias=False)
        self.at_once: AllBlocks | None = None  # all blocks, for the steps that it takes
        initialize(self, config.initializer_range)
        self.set_attention(attn_implementation)

    def set_attention(self, name: str) -> None:
        """Choose the attention backend by name; `ModelError` with the reason if it cannot run where the weights are."""
        weight = next(self.blocks[0].parameters())
        self.attention, self._attend = choose(name, weight.device, weight.dtype)

    def set_kv_dtype(self, dtype: torch.dtype | None) -> None:
        """Choose in which type keys and values are cached; None: that of the activations."""
        for block in cast("Iterator[DbrxBlock]", self.blocks):
            block.norm_attn_norm.attn.kv_dtype = dtype

    @property
    def device(self) -> torch.device:
        """Where input ids belong."""
        return cast("Tensor", self.wte.weight).device

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        output_router_logits: bool | None = None,
        last_only: bool = False,
    ) -> BaseOutput:
        """Run one step over the rows of a batch.

        input_ids [batch, seq], or inputs_embeds [batch, seq, d_model]; attention_mask [batch, seq] or, as
        transformers has it, [batch, past + seq]: 0 marks padding, on either side; position_ids [batch, seq], counted
        over real tokens if not given. With `past_key_values` the step goes on behind the cached tokens.
        last_only: hidden states of the last position alone, which saves most of the last block's work.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.wte(input_ids).to(self.norm_f.weight.dtype) if inputs_embeds is None else inputs_embeds
        batch, seq = x.shape[:2]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values
        if cache is None and use_cache:
            cache = KVCache(len(self.blocks), batch)
        if cache is not None and len(cache.rows) != batch:
            raise ValueError(f"past_key_values has {len(cache.rows)} rows, the input {batch}")
        valid = None if attention_mask is None else attention_mask[:, -seq:].bool().to(x.device)
        plan = AttentionPlan(cache.lengths if cache is not None else [0] * batch, seq, valid, x.device)
        head_dim, theta = self.config.head_dim, self.config.attn_config.rope_theta
        if plan.one_each and position_ids is None:
            cos, sin = rotary_rows(plan.starts, head_dim, theta, x.device)
        else:
            positions = plan.positions if position_ids is None else position_ids.to(x.device)
            cos, sin = rotary_table(positions, head_dim, theta)
        keeps_hidden = output_hidden_states or inputs_embeds is not None
        step = Step(plan, self._attend, cache, output_attentions, keeps_hidden, last_only)

        hidden, attentions = [], []
        routers: list[Tensor] = []
        at_once = self.at_once if self.at_once is not None and self.at_once.takes(step) else None
        if at_once is not None:
            routers = list(at_once(x, cos, sin, step))
        for block in self.blocks if at_once is None else ():
            if output_hidden_states:
                hidden.append(x)
            x, probabilities, weights = block(x, cos, sin, step)
            routers.append(probabilities)
            if weights is not None:
                attentions.append(plan.spread(weights))
        if cache is not None:
            cache.advance(plan)
        # On a CPU a norm of several rows wakes PyTorch's threads, which then take the cores from the native library's.
        rows = x.split(1) if at_once is not None and x.device.type == "cpu" else (x,)
        x = torch.cat([self.norm_f(row) for row in rows]) if len(rows) > 1 else self.norm_f(x)
        want_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        return BaseOutput(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(routers) if want_routers else None,
        )


def initialize(module: nn.Module, std: float) -> None:
    """Matrices from a normal distribution, norms 1 (no work on the meta device)."""
    for parameter in module.parameters():
        if parameter.is_meta:
            continue
        with torch.no_grad():
            parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(0, std)
