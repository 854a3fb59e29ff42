"""DBRX of vLLM's layers. Modules are named as in the checkpoint; the experts' tensors find theirs by weights.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from .config import DbrxConfig
from .weights import experts, place


def config_of(vllm_config: VllmConfig) -> DbrxConfig:
    """The model's configuration; `TypeError` if it was read by other rules than ours."""
    config = vllm_config.model_config.hf_config
    if not isinstance(config, DbrxConfig):
        raise TypeError(f"the configuration is a {type(config)}, since something else is registered for `dbrx`")
    return config


class DbrxAttention(nn.Module):
    """Grouped-query attention with rotary positions; each rank has its heads."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant = config_of(vllm_config), vllm_config.quant_config
        size = config.d_model // config.n_heads
        self.clip = config.attn_config.clip_qkv
        self.Wqkv = QKVParallelLinear(
            config.d_model, size, config.n_heads, config.attn_config.kv_n_heads, False,
            quant_config=quant, prefix=f"{prefix}.Wqkv",
        )  # fmt: skip
        self.out_proj = RowParallelLinear(
            config.d_model, config.d_model, False, quant_config=quant, prefix=f"{prefix}.out_proj"
        )
        self.rotary = get_rope(size, max_position=config.max_seq_len, rope_parameters=config.rope_parameters)
        heads, kv_heads = self.Wqkv.num_heads, self.Wqkv.num_kv_heads
        self.widths = [heads * size, kv_heads * size, kv_heads * size]
        self.attn = Attention(
            heads, size, size**-0.5, num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config, quant_config=quant, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        qkv, _ = self.Wqkv(x)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv.split(self.widths, dim=-1)
        q, k = self.rotary(positions, q, k)
        out, _ = self.out_proj(self.attn(q, k, v))
        return out  # type: ignore[no-any-return]


class DbrxRouter(nn.Module):
    """Logits over the experts, whole on each rank."""

    def __init__(self, config: DbrxConfig, prefix: str) -> None:
        super().__init__()
        self.layer = GateLinear(config.d_model, config.ffn_config.moe_num_experts, prefix=f"{prefix}.layer")

    def forward(self, x: Tensor) -> Tensor:
        logits, _ = self.layer(x)
        return logits  # type: ignore[no-any-return]


class DbrxFFN(nn.Module):
    """The experts and their router."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = config_of(vllm_config)
        ffn = config.ffn_config
        if ffn.moe_normalize_expert_weights not in (None, 1):
            raise ValueError("vLLM divides the chosen experts' weights by their sum (moe_normalize_expert_weights 1)")
        self.router = DbrxRouter(config, f"{prefix}.router")
        self.experts = FusedMoEFactory(
            ffn.moe_num_experts, ffn.moe_top_k, config.d_model, ffn.ffn_hidden_size,
            renormalize=ffn.moe_normalize_expert_weights is not None,
            activation=(ffn.ffn_act_fn or {}).get("name", "silu"),
            quant_config=vllm_config.quant_config, prefix=f"{prefix}.experts",
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x))  # type: ignore[no-any-return]


class DbrxNormAttention(nn.Module):
    """Attention with the norm before it, and the norm behind it that the experts read."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        width = config_of(vllm_config).d_model
        self.norm_1 = nn.LayerNorm(width, bias=False)
        self.attn = DbrxAttention(vllm_config, f"{prefix}.attn")
        self.norm_2 = nn.LayerNorm(width, bias=False)

    def forward(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attn(positions, self.norm_1(x))
        return x, self.norm_2(x)


class DbrxBlock(nn.Module):
    """A layer."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.norm_attn_norm = DbrxNormAttention(vllm_config, f"{prefix}.norm_attn_norm")
        self.ffn = DbrxFFN(vllm_config, f"{prefix}.ffn")

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        x, normed = self.norm_attn_norm(positions, x)
        return x + self.ffn(normed)  # type: ignore[no-any-return]


class DbrxModel(nn.Module):
    """The layers of this rank; with pipeline parallelism the hidden states come from the rank before."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = config_of(vllm_config)
        self.wte = VocabParallelEmbedding(config.vocab_size, config.d_model)
        self.start, self.end, self.blocks = make_layers(
            config.n_layers, lambda prefix: DbrxBlock(vllm_config, prefix), prefix=f"{prefix}.blocks"
        )
        self.norm_f = nn.LayerNorm(config.d_model, bias=False)

    def forward(
        self,
        ids: Tensor | None,
        positions: Tensor,
        received: IntermediateTensors | None,
        embeds: Tensor | None,
    ) -> Tensor | IntermediateTensors:
        if received is not None:
            x = received["hidden_states"]
        else:
            x = self.wte(ids) if embeds is None else embeds
        for block in self.blocks[self.start : self.end]:
            x = block(positions, x)
        return self.norm_f(x) if get_pp_group().is_last_rank else IntermediateTensors({"hidden_states": x})


class DbrxForCausalLM(nn.Module, SupportsPP):  # type: ignore[misc]
    """What vLLM asks of a model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = config_of(vllm_config)
        self.config = config
        self.transformer = DbrxModel(vllm_config, maybe_prefix(prefix, "transformer"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.d_model,
            quant_config=vllm_config.quant_config, prefix=maybe_prefix(prefix, "lm_head"),
        )  # fmt: skip
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.d_model
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Ids [tokens] -> hidden states [tokens, d_model]."""
        return self.transformer.wte(input_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """One step; see `DbrxModel`."""
        return self.transformer(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [tokens, vocab] on the rank that samples."""
        return self.logits_processor(self.lm_head, hidden_states)  # type: ignore[no-any-return]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Give each tensor of a checkpoint to its parameter, which takes its rank's part; returns what was loaded."""
        parameters: dict[str, Any] = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            if is_pp_missing_parameter(name, self):
                continue
            stacked = place(name, parameters)
            target, part = stacked or (name, "")
            parameter = parameters[target]
            if not part:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            else:
                for i, expert in enumerate(experts(tensor, part, self.config.num_experts)):
                    parameter.weight_loader(parameter, expert, target, shard_id=part, expert_id=i)
            loaded.add(target)
        return loaded
