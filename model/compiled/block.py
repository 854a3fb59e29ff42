"""A network of which functions are compiled: a decode step of a lone row, and products of many, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..config import DbrxConfig
from ..experts import PackedExperts
from ..experts.matrices import MatricesKernel, Prepared
from ..packing import Packing
from ..quantization import MatrixKernel, Packed, PackedLinear, Rows
from ..quantization.nibbles import NibbleRows
from ..quantization.rows import ByteRows, FloatRows, OneDnnByteRows, with_seconds
from ..quantization.widened import widens
from ..transformer import DbrxBlock, DbrxForCausalLM, Step
from .compiler import Function
from .form import Form, Matrices
from .tiles import OUTPUTS, ROWS

PIECE = 2**23  # weights that become integers at once
# Of bytes, those that are multiplied as they are come first.
KINDS: dict[Matrices, type] = {"floats": FloatRows, "bytes": OneDnnByteRows, "widened": ByteRows, "nibbles": NibbleRows}
# Rows an expert, on average, up to which one by one is faster than all at once, for which weights first become wider
# or are put into an order of oneDNN's; and of floats that are multiplied as they are.
FEW: dict[Matrices | None, int] = {"floats": 5, "bytes": 3, "widened": 3, "nibbles": 12}
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

    def __init__(self, linear: PackedLinear, function: Function) -> None:
        super().__init__(linear.kernel, linear.packed, linear.last)
        self.function = function

    def multiply(self, rows: Tensor) -> Tensor:
        """[n, inputs] -> [n, outputs]."""
        outputs = max(1, PIECE // rows.shape[1] // OUTPUTS) * OUTPUTS
        pieces = zip(*(part.split(outputs) for part in self.packed), strict=True)
        return torch.cat([_run(self.function, rows, piece) for piece in pieces], dim=1)


class CompiledExperts(PackedExperts):
    """A layer's experts. Few rows go through one compiled function, one by one, an expert's many through another."""

    def __init__(self, held: PackedExperts, functions: Mapping[str, Function]) -> None:
        kernel = cast("MatricesKernel", held.kernel)
        if "expert" in functions:
            kernel = CompiledExpert(kernel, functions["expert"])
        elif "hidden" in functions:
            kernel = CompiledByteExpert(kernel, functions["hidden"], functions["sums"])
        super().__init__(kernel, held.experts)
        self.function = functions["experts"]
        self.stacked = held.stacked
        matrices = kernel.matrices
        as_they_are = isinstance(matrices, FloatRows) and not widens(matrices.dtype, torch.device("cpu"))
        self.few = FEW_AS_THEY_ARE if as_they_are else FEW.get(_kind(matrices), 0)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [n, d_model], chosen [n, top_k] ids, weights [n, top_k] -> [n, d_model], the weighted sum."""
        if len(x) > 1 and chosen.numel() > self.few * len(self.experts):
            return super().forward(x, chosen, weights)
        rows = (torch.split(part, 1) for part in (x.float(), chosen, weights.float()))
        zero = x.new_zeros(1, 1, x.shape[1])
        return torch.cat([self.lone(zero, *row)[0] for row in zip(*rows, strict=True)])

    def lone(self, x: Tensor, normed: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [1, 1, d_model], and float32 normed [1, d_model] and weights [1, top_k] -> x with what they add."""
        (x,) = self.function([x, normed, weights, chosen, *self.stacked])
        return x


class CompiledExpert(MatricesKernel):
    """Many rows go through a compiled function."""

    def __init__(self, kernel: MatricesKernel, function: Function) -> None:
        super().__init__(kernel.matrices, kernel.activation)
        self.function = function

    def prepare(self, x: Tensor) -> Prepared:
        """Rows as they are: to put them in order again for each expert takes a hundredth of its time."""
        return Prepared(x.dtype, (x,))

    def run(self, prepared: Prepared, rows: Tensor | None, packed: Packed) -> Tensor:
        """The expert's output [len(rows), d_model] for those rows (None: all)."""
        (x,) = prepared.rows
        if rows is not None:
            x = x.index_select(0, rows)
        return _run(self.function, x, [part for matrix in packed for part in matrix])


class CompiledByteExpert(MatricesKernel):
    """Many rows are multiplied by oneDNN; what lies between the products, and behind them, goes through functions."""

    def __init__(self, kernel: MatricesKernel, hidden: Function, sums: Function) -> None:
        super().__init__(kernel.matrices, kernel.activation)
        self.hidden = hidden
        self.sums = sums

    def run(self, prepared: Prepared, rows: Tensor | None, packed: Packed) -> Tensor:
        """The expert's output [len(rows), d_model] for those rows (None: all)."""
        dtype, x = prepared
        if rows is not None:
            x = tuple(part.index_select(0, rows) for part in x)
        (w1, scale, v1, up_scale), (w2, out_scale) = packed
        levels, places = _with_seconds(x)
        gate, up = (torch._int_mm(levels, matrix.t()) for matrix in (w1, v1))
        x = tuple(self.hidden([gate, up, scale, up_scale, x[2], places]))
        levels, places = _with_seconds(x)
        (out,) = self.sums([torch._int_mm(levels, w2.t()), out_scale, x[2], places])
        return out.to(dtype)


def _with_seconds(x: Rows) -> tuple[Tensor, Tensor]:
    """`with_seconds`, but where a row's second is, or the row itself [n]."""
    rows, second = with_seconds(x)
    n, places = len(x[0]), torch.arange(len(x[0]))
    places[second] = torch.arange(n, len(rows))
    return rows, places


def _run(function: Function, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A function of whole tiles of rows x [n, inputs] -> [n, outputs]."""
    tiles = pad(x, (0, 0, 0, -len(x) % ROWS)).contiguous()  # nobody checks the strides that it was compiled for
    (out,) = function([tiles, *matrices])
    return out[: len(x)]


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
        return packed if function is None or len(packed.packed[0]) % OUTPUTS else CompiledLinear(packed, function)

    blocks = network.transformer.blocks
    for i, block in enumerate(cast("Iterator[DbrxBlock]", blocks)):
        attn = block.norm_attn_norm.attn
        for name in ("Wqkv", "out_proj"):
            setattr(attn, name, linear(getattr(attn, name)))
        if "experts" in functions:
            block.ffn.experts = CompiledExperts(cast("PackedExperts", block.ffn.experts), functions)
        blocks[i] = CompiledBlock(block, functions)
    network.lm_head = CompiledHead(linear(network.lm_head), functions["head"])  # type: ignore[assignment]  # as PackedLinear before it


def _kind(kernel: MatrixKernel) -> Matrices | None:
    return next((name for name, cls in KINDS.items() if isinstance(kernel, cls)), None)


def _packed(linear: nn.Module) -> Packed:
    return cast("PackedLinear", linear).packed
