"""A network of which functions are compiled: a decode step of a lone row, and products of many, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..config import DbrxConfig
from ..experts import PackedExperts
from ..experts.kernel import places_by_expert
from ..experts.matrices import MatricesKernel
from ..packing import Packing
from ..quantization import MatrixKernel, Packed, PackedLinear
from ..quantization.blocks import FloatBlocks, as_onednn
from ..quantization.nibbles import NibbleRows
from ..quantization.rows import ByteRows, FloatRows, OneDnnByteRows
from ..quantization.widened import widens
from ..transformer import DbrxBlock, DbrxForCausalLM, Step
from .call import Function
from .cores import side_by_side
from .form import Form, Matrices
from .tiles import OUTPUTS, ROWS, pays

PIECE = 2**23  # weights that become integers at once
AT_ONCE = 1024  # rows of which experts' outputs are kept, each, until they are added
# Of bytes, those that are multiplied as they are come first.
KINDS: dict[Matrices, type] = {
    "floats": FloatRows,
    "blocks": FloatBlocks,
    "bytes": OneDnnByteRows,
    "widened": ByteRows,
    "nibbles": NibbleRows,
}
# Rows an expert, on average, up to which one by one is faster than all at once, for which weights first become wider
# or are put into an order of oneDNN's; and of floats that are multiplied as they are.
FEW: dict[Matrices | None, int] = {"floats": 5, "blocks": 1, "bytes": 3, "widened": 3, "nibbles": 12}
FEW_AS_THEY_ARE = 2


class CompiledBlock(DbrxBlock):
    """Takes the parts of a packed block over. A lone row goes through compiled functions, all else as it did."""

    def __init__(self, block: DbrxBlock, functions: Mapping[str, Function]) -> None:
        nn.Module.__init__(self)
        self.is_last = block.is_last
        self.norm_attn_norm = half = block.norm_attn_norm
        self.ffn = block.ffn
        self.attend = functions["attend"]
        # Found once: what a model's weights have driven out of the caches takes as long to find as a matrix to read.
        self.layer = half.attn.layer
        self.key = half.norm_1.weight.new_empty(1, 1, half.attn.heads[-1], half.attn.head_dim)  # as one is cached
        matrices = *_packed(half.attn.Wqkv), *_packed(half.attn.out_proj)
        self.weights = half.norm_1.weight, *matrices, half.norm_2.weight, self.ffn.router.layer.weight

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        plan, cache = step.plan, step.cache
        if not plan.lone or cache is None or step.want_attentions:
            return super().forward(x, cos, sin, step)
        room = (part.transpose(1, 2) for part in cache.room(self.layer, self.key, plan.kv_len))
        x, normed, probabilities, shares, chosen = self.attend([x, cos, sin, *room, plan.keys, *self.weights])
        experts = self.ffn.experts
        if isinstance(experts, CompiledExperts):
            return experts.lone(x, normed, chosen, shares), probabilities, None
        return x + experts(normed.to(x.dtype), chosen, shares.to(x.dtype)), probabilities, None


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


class CompiledLinear(PackedLinear):
    """Many rows go through a compiled function."""

    def __init__(self, linear: PackedLinear, function: Function, multiple: int) -> None:
        super().__init__(linear.kernel, linear.packed, linear.last)
        self.function = function
        self.multiple = multiple

    def multiply(self, rows: Tensor) -> Tensor:
        """[n, inputs] -> [n, outputs]."""
        # Nobody checks the strides that it was compiled for.
        whole = pad(rows, (0, 0, 0, -len(rows) % self.multiple)).contiguous()
        outputs = max(1, PIECE // rows.shape[1] // OUTPUTS) * OUTPUTS
        pieces = zip(*(part.split(outputs) for part in self.packed), strict=True)
        return torch.cat([self.function([whole, *piece])[0] for piece in pieces], dim=1)[: len(rows)]


class CompiledExperts(PackedExperts):
    """A layer's experts. Few rows go through one compiled function, one by one, an expert's many through another."""

    def __init__(self, held: PackedExperts, functions: Mapping[str, Function], multiple: int) -> None:
        super().__init__(held.kernel, held.experts)
        self.lone_row = functions["experts"]
        self.many_rows = functions.get("expert")
        self.multiple = multiple
        self.stacked = held.stacked
        matrices = cast("MatricesKernel", held.kernel).matrices
        parts = [[part for matrix in packed for part in matrix] for packed in held.experts]
        if isinstance(matrices, FloatBlocks):
            parts = [list(map(as_onednn, expert)) for expert in parts]
        self.parts = parts  # of experts, as many rows are multiplied by them
        as_they_are = isinstance(matrices, FloatRows) and not widens(matrices.dtype, torch.device("cpu"))
        self.few = FEW_AS_THEY_ARE if as_they_are else FEW.get(_kind(matrices), 0)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [n, d_model], chosen [n, top_k] ids, weights [n, top_k] -> [n, d_model], the weighted sum."""
        if len(x) > 1 and chosen.numel() > self.few * len(self.experts):
            if self.many_rows is None:
                return super().forward(x, chosen, weights)
            parts = zip(*(torch.split(part, AT_ONCE) for part in (x, chosen, weights)), strict=True)
            return torch.cat([self._many(self.many_rows, *part) for part in parts])
        rows = (torch.split(part, 1) for part in (x.float(), chosen, weights.float()))
        zero = x.new_zeros(1, 1, x.shape[1])
        return torch.cat([self.lone(zero, *row)[0] for row in zip(*rows, strict=True)])

    def lone(self, x: Tensor, normed: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [1, 1, d_model], and float32 normed [1, d_model] and weights [1, top_k] -> x with what they add."""
        (x,) = self.lone_row([x, normed, weights, chosen, *self.stacked])
        return x

    def _many(self, function: Function, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        x, flat, out = x.contiguous(), weights.flatten(), x.new_empty(*chosen.shape, x.shape[1])

        def compute(job: tuple[list[Tensor], Tensor]) -> None:
            parts, places = job
            function([x, flat, places, out.flatten(0, 1), *parts])

        # To whole tiles, with places that are computed twice. What takes longest begins first.
        jobs = [
            (self.parts[expert], torch.cat((places, places[:1].expand(-len(places) % self.multiple))))
            for expert, places in places_by_expert(len(self.experts), chosen)
        ]
        jobs.sort(key=lambda job: -len(job[1]))
        if self.multiple == 1:
            side_by_side(compute, jobs)
        else:  # tiles may need an expert's weights as integers: of one at a time, or a prompt takes 0.2 GB more
            for job in jobs:
                compute(job)
        return out.sum(1)


def form_of(config: DbrxConfig, packing: Packing, experts: bool) -> Form:
    """What has to be compiled. experts: whether they are packed too, and not streamed."""
    sparse = packing.experts.matrices
    return Form(
        config,
        dtype=str(packing.dtype).removeprefix("torch."),
        dense=_kind(packing.dense),
        experts=_kind(sparse) if experts else None,
        group=sparse.group if isinstance(sparse, NibbleRows) else 0,
    )


def compile_into(network: DbrxForCausalLM, functions: Mapping[str, Function]) -> None:
    """Let what a packed network computes go through compiled functions."""

    def linear(packed: nn.Module) -> PackedLinear:
        packed = cast("PackedLinear", packed)
        function = functions.get("linear")
        if function is None or len(packed.packed[0]) % OUTPUTS:
            return packed
        return CompiledLinear(packed, function, _multiple(packed.kernel))

    blocks = network.transformer.blocks
    for i, block in enumerate(cast("Iterator[DbrxBlock]", blocks)):
        attn = block.norm_attn_norm.attn
        for name in ("Wqkv", "out_proj"):
            setattr(attn, name, linear(getattr(attn, name)))
        if "experts" in functions:
            held = cast("PackedExperts", block.ffn.experts)
            multiple = _multiple(cast("MatricesKernel", held.kernel).matrices)
            block.ffn.experts = CompiledExperts(held, functions, multiple)
        blocks[i] = CompiledBlock(block, functions)
    network.lm_head = CompiledHead(linear(network.lm_head), functions["head"])  # type: ignore[assignment]  # as PackedLinear before it


def _kind(kernel: MatrixKernel) -> Matrices | None:
    return next((name for name, cls in KINDS.items() if isinstance(kernel, cls)), None)


def _multiple(kernel: MatrixKernel) -> int:
    """How many rows a compiled function takes at once."""
    return ROWS if pays(_kind(kernel), kernel.dtype) else 1


def _packed(linear: nn.Module) -> Packed:
    return cast("PackedLinear", linear).packed
