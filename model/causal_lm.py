"""DBRX with its head: what loads a checkpoint, generates text and saves. The network below knows none of it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .absent import absent
from .checkpoint import expected_tensors
from .config import DbrxConfig
from .experts import HybridExperts
from .kv_cache import KVCache
from .moe import load_balancing_loss
from .outputs import CausalLMOutput
from .placement import PREFILL_CHUNK
from .transformer import DbrxBlock, DbrxModel, initialize

if TYPE_CHECKING:
    from .experts import Bus
    from .generation_config import GenerationConfig
    from .load_plan import LoadPlan
    from .model_files import ModelFiles
    from .packing import KernelChoice
    from .streaming import ExpertStore


class DbrxForCausalLM(nn.Module):
    """DBRX with its language-model head: ids -> logits of the next token, and text generation."""

    def __init__(self, config: DbrxConfig, attn_implementation: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.transformer = DbrxModel(config, attn_implementation)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        initialize(self.lm_head, config.initializer_range)
        self.generation_config: GenerationConfig | None = None
        self.device_map: dict[str, Any] = {}
        self.adapter = "none"  # else the checksum of the LoRA adapter in the weights
        self.expert_store: ExpertStore | None = None  # where streamed experts come from
        self.bus: Bus | None = None  # to a card, beside which the CPU computes experts
        self.load_plan: LoadPlan | None = None  # what was decided when it was loaded
        self.kernels: KernelChoice | None = None  # kernels that the weights were packed for
        self.prefill_chunk = PREFILL_CHUNK  # tokens a step of prefill

    @property
    def device(self) -> torch.device:
        """Where input ids belong."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return self.transformer.norm_f.weight.dtype

    @property
    def kv_dtype(self) -> torch.dtype:
        """In which keys and values are cached."""
        return cast("DbrxBlock", self.transformer.blocks[0]).norm_attn_norm.attn.kv_dtype or self.dtype

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the form that it is computed with."""
        hidden, d_model, itemsize = self.config.ffn_config.ffn_hidden_size, self.config.d_model, self.kv_dtype.itemsize
        if self.kernels is not None:
            return self.kernels.experts.nbytes(hidden, d_model, itemsize)
        return 3 * hidden * d_model * itemsize

    def on_card(self) -> dict[str, Any] | None:
        """What a card computes with: kernels, graph, experts by place, bytes over the bus so far; None without one."""
        plan, bus = self.load_plan, self.bus
        if plan is None or not plan.machine.gpus:
            return None
        return {
            "kernels": self.kernels.name if self.kernels else "float",
            "graph": getattr(self.transformer.at_once, "graph", "none"),
            "experts": dict(plan.experts_by_place),
            "bus_bytes": {"down": bus.down, "up": bus.up, "weights": bus.weights} if bus else None,
        }

    @property
    def runs_ahead(self) -> bool:
        """Whether a decode step asks for no number, so that the next one may begin before its ids are known here."""
        return self.transformer.at_once is not None and self.transformer.at_once.runs_ahead

    def place_by_use(self) -> None:
        """Before a reply: experts on a card and on the CPU change places where their use says that it pays."""
        if self.bus is not None:
            layers = [module for module in self.modules() if isinstance(module, HybridExperts)]
            self.bus.rearrange(layers, self.config.ffn_config.moe_top_k)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise absent("DbrxForCausalLM", name) from None

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def num_parameters(self) -> int:
        """Numbers in the checkpoint, wherever its weights are held."""
        return sum(map(prod, expected_tensors(self.config).values()))

    def set_attn_implementation(self, name: str) -> None:
        """See `DbrxModel.set_attention`."""
        self.transformer.set_attention(name)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path | ModelFiles, **options: Any) -> Self:
        """Load a checkpoint; see `loading.from_pretrained` for the options."""
        from .loading import from_pretrained

        return from_pretrained(cls, name_or_path, **options)

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = 5_000_000_000) -> None:
        """Write config.json, generation_config.json and safetensors of at most `max_shard_size` bytes (or "5GB")."""
        from .loading import save_pretrained

        save_pretrained(self, Path(folder), max_shard_size)

    def tie_weights(self) -> None:
        """Nothing to do, since DBRX ties no weights; accelerate asks."""

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continue each row; see `generation.generate` for the options. Returns [batch, prompt + new] ids."""
        from .generation import generate

        return generate(self, input_ids, attention_mask, **options)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        output_router_logits: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """As DbrxModel, then logits of the last `logits_to_keep` positions (0: all) in the weights' dtype.

        labels [batch, seq]: the same ids as the input; -100 is left out. The loss is the mean cross-entropy of each
        next token, plus `moe_loss_weight` x the load-balancing loss when router logits are asked for.
        """
        out = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            output_router_logits,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = aux_loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))
        if out.router_logits is not None:
            ffn = self.config.ffn_config
            mask = None if attention_mask is None else attention_mask[:, -out.last_hidden_state.shape[1] :]
            aux_loss = load_balancing_loss(out.router_logits, ffn.moe_top_k, mask)
            if loss is not None:
                loss = loss + ffn.moe_loss_weight * aux_loss.to(loss.device)
        return CausalLMOutput(
            loss, aux_loss, logits, out.past_key_values, out.hidden_states, out.attentions, out.router_logits
        )
