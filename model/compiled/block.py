"""A network whose decode step is compiled: of a lone row, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from ..config import DbrxConfig
from ..packing import Packing
from ..quantization import MatrixKernel, Packed, PackedLinear
from ..quantization.rows import ByteRows, FloatRows
from ..quantization.words import NibbleRows, WordRows
from ..transformer import DbrxBlock, DbrxForCausalLM, Step
from .compiler import Function
from .form import Form, Matrices

if TYPE_CHECKING:
    from ..experts import PackedExperts

KINDS: dict[Matrices, type] = {"floats": FloatRows, "bytes": ByteRows, "words": WordRows, "nibbles": NibbleRows}


class CompiledBlock(DbrxBlock):
    """Takes the parts of a packed block over. A lone row goes through compiled functions, all else as it did."""

    def __init__(self, block: DbrxBlock, functions: Mapping[str, Function]) -> None:
        nn.Module.__init__(self)
        self.is_last = block.is_last
        self.norm_attn_norm = half = block.norm_attn_norm
        self.ffn = block.ffn
        self.attend, self.experts = functions["attend"], functions.get("experts")
        # Found once: what a model's weights have driven out of the caches takes as long to find as a matrix to read.
        self.layer = half.attn.layer
        self.key = half.norm_1.weight.new_empty(1, 1, half.attn.heads[-1], half.attn.head_dim)  # as one is cached
        matrices = *_packed(half.attn.Wqkv), *_packed(half.attn.out_proj)
        self.weights = half.norm_1.weight, *matrices, half.norm_2.weight, self.ffn.router.layer.weight
        if self.experts is not None:
            held = cast("PackedExperts", block.ffn.experts).experts
            self.expert_parts = [[part for matrix in expert for part in matrix] for expert in held]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        plan, cache = step.plan, step.cache
        if not plan.lone or cache is None or step.want_attentions:
            return super().forward(x, cos, sin, step)
        room = (part.transpose(1, 2) for part in cache.room(self.layer, self.key, plan.kv_len))
        x, normed, probabilities, shares, chosen = self.attend([x, cos, sin, *room, plan.keys, *self.weights])
        if self.experts is None:
            out = self.ffn.experts(normed.to(x.dtype), chosen, shares.to(x.dtype))
            return x + out, probabilities, None
        parts = [part for expert in chosen.tolist()[0] for part in self.expert_parts[expert]]
        (x,) = self.experts([x, normed, shares, *parts])
        return x, probabilities, None


class CompiledHead(nn.Module):
    """The last matrix, packed; a lone row goes through a compiled function."""

    def __init__(self, head: PackedLinear, function: Function) -> None:
        super().__init__()
        self.head = head
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != x.shape[-1]:
            return cast("Tensor", self.head(x))
        (out,) = self.function([x.reshape(1, 1, -1), *self.head.packed])
        return out.view(*x.shape[:-1], -1)


def form_of(config: DbrxConfig, packing: Packing, experts: bool) -> Form:
    """What has to be compiled. experts: whether they are packed too, and not streamed."""

    def kind(kernel: MatrixKernel) -> Matrices | None:
        return next((name for name, cls in KINDS.items() if isinstance(kernel, cls)), None)

    sparse = packing.experts.matrices
    return Form(
        config,
        dtype=str(packing.dtype).removeprefix("torch."),
        dense=kind(packing.dense),
        experts=kind(sparse) if experts else None,
        group=sparse.group if isinstance(sparse, NibbleRows) else 0,
    )


def compile_into(network: DbrxForCausalLM, functions: Mapping[str, Function]) -> None:
    """Let the decode steps of a packed network go through compiled functions."""
    blocks = network.transformer.blocks
    for i, block in enumerate(blocks):
        blocks[i] = CompiledBlock(cast("DbrxBlock", block), functions)
    head = cast("PackedLinear", network.lm_head)
    network.lm_head = CompiledHead(head, functions["head"])  # type: ignore[assignment]  # as PackedLinear before it


def _packed(linear: nn.Module) -> Packed:
    return cast("PackedLinear", linear).packed
