"""Decoding through the native library: a step of a token a row is one call for all layers, where they are in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_void_p, cast
from typing import TYPE_CHECKING
from typing import cast as typed

import torch
from torch import Tensor, nn

from ..native.abi import GEMV_MAX_ROWS, KV, Block, Format
from ..native.tensors import Experts, address
from ..transformer import EPS, DbrxBlock, Step
from .linear import PackedLinear
from .native_call import ACTIVATIONS, CALL, float_matrix, function
from .native_linear import NativeProducts

if TYPE_CHECKING:
    from ..causal_lm import DbrxForCausalLM
    from ..config import DbrxConfig
    from ..kv_cache import KVCache, Pointers

KV_FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}


class NativeBlock(DbrxBlock):
    """Takes the parts of a packed block over. A step of a token a row goes through the library, all else as it did.

    Where experts are streamed it is the half before them, else mostly `NativeBlocks` does it for all blocks at once.
    The residual stream is written in place, so a step that shows its hidden states has it copied first.
    """

    def __init__(self, block: DbrxBlock, config: DbrxConfig) -> None:
        nn.Module.__init__(self)
        self.is_last = block.is_last
        self.norm_attn_norm = half = block.norm_attn_norm
        self.ffn = block.ffn
        self.layer = half.attn.layer
        # As one token of a row is cached.
        self.key = torch.empty(1, 1, half.attn.heads[-1], half.attn.head_dim, dtype=half.attn.kv_dtype)
        held = getattr(self.ffn.experts, "held", None)
        self.held = held if isinstance(held, Experts) else None  # None: they come one by one, or by another kernel
        self.block = _describe(self, config, self.held)
        self.attend = function("dbrx_attend")
        self.n_experts, self.top_k = config.ffn_config.moe_num_experts, config.ffn_config.moe_top_k
        self.weights = torch.empty(GEMV_MAX_ROWS, self.top_k)
        self.ids = torch.empty(GEMV_MAX_ROWS, self.top_k, dtype=torch.int32)
        self.table = _Table(self.key)
        self.alone = NativeBlocks([self]) if self.held is not None else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        if not _is_decoding(step):
            return super().forward(x, cos, sin, step)
        x = x.clone(memory_format=torch.contiguous_format) if step.keeps_hidden else x
        if self.alone is not None:
            return x, self.alone(x, cos, sin, step)[0], None
        n = len(step.plan.starts)
        self.table.point([_room(self, step)], step.plan.starts, cos, sin)
        probabilities, normed = torch.empty(n, self.n_experts), torch.empty(n, x.shape[-1])
        outputs = normed, probabilities, self.weights, self.ids
        self.attend(self.block, n, self.table.rows, x.data_ptr(), *(each.data_ptr() for each in outputs))
        return x + self.ffn.experts(normed, self.ids[:n], self.weights[:n]).view_as(x), probabilities, None


class NativeBlocks:
    """A decode step through blocks whose experts are held: in calls of some tenths of a second at most, for Ctrl-C.

    With a call a layer Python took 1 of 14 ms for a token of `mini`: the weights had driven its memory from the caches.
    """

    runs_ahead = False

    def __init__(self, blocks: Sequence[NativeBlock]) -> None:
        self.blocks = blocks
        self.described = (Block * len(blocks))(*(block.block for block in blocks))
        self.step = function("dbrx_step")
        self.table = _Table(blocks[0].key, len(blocks))
        (w1, *_), top_k = typed("Experts", blocks[0].held).matrices[0], blocks[0].top_k
        self.at_once = max(1, CALL // (6 * top_k * w1.outputs * w1.inputs * GEMV_MAX_ROWS))

    def takes(self, step: Step) -> bool:
        """Whether it can compute a step."""
        return _is_decoding(step) and not step.keeps_hidden

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """Write the new residual stream to x [n, 1, d_model]; gives router probabilities [blocks, n, experts]."""
        first, starts, count = self.blocks[0], step.plan.starts, len(self.blocks)
        n, rows = len(starts), self.table.rows
        self.table.point([_room(block, step) for block in self.blocks], starts, cos, sin)
        probabilities = torch.empty(count, n, first.n_experts)
        for i in range(0, count, self.at_once):
            inputs = byref(self.described[i]), min(self.at_once, count - i), n, byref(rows[i * n]), x.data_ptr()
            self.step(*inputs, probabilities[i].data_ptr(), first.weights.data_ptr(), first.ids.data_ptr())
        return probabilities


def _is_decoding(step: Step) -> bool:
    plan = step.plan
    cached = step.cache is not None and not step.want_attentions
    return cached and plan.one_each and len(plan.starts) <= GEMV_MAX_ROWS


def _room(block: NativeBlock, step: Step) -> list[Pointers]:
    rows = zip(typed("KVCache", step.cache).rows, step.plan.lengths, strict=True)
    return [row.pointers(block.layer, block.key, stop) for row, stop in rows]


class _Table:
    """Where keys and values lie: a `native.KV` for each token of a step in each layer."""

    def __init__(self, key: Tensor, layers: int = 1) -> None:
        self.rows = (KV * (layers * GEMV_MAX_ROWS))()
        self._each = list(self.rows)
        for row in self._each:
            row.format = KV_FORMATS[key.dtype]
        self._angles = key.shape[-1] * torch.float32.itemsize
        self._of: list[Pointers] = []  # what it points to

    def point(self, layers: Sequence[Sequence[Pointers]], starts: Sequence[int], cos: Tensor, sin: Tensor) -> None:
        """layers: in each, the blocks of each token's row; starts: its place there; cos, sin [n, 1, 1, head_dim]."""
        n, pointers = len(starts), [each for layer in layers for each in layer]
        if pointers != self._of:
            self._of = pointers
            for kv, each in zip(self._each, pointers):  # noqa: B905  # there are more places than rows
                kv.keys, kv.values = cast(each.keys, POINTER(c_void_p)), cast(each.values, POINTER(c_void_p))
                kv.block_tokens = each.room // len(each.keys)
                kv.token_stride, kv.head_stride = each.strides
        at_cos, at_sin = cos.data_ptr(), sin.data_ptr()
        for i, start in enumerate(starts):
            for kv in self._each[i : n * len(layers) : n]:
                kv.position, kv.cos, kv.sin = start, at_cos + i * self._angles, at_sin + i * self._angles


def decode_natively(network: DbrxForCausalLM) -> None:
    """Let decode steps of a network go through the native library, where that holds its matrices."""
    blocks = network.transformer.blocks
    for i, block in enumerate(typed("Iterator[DbrxBlock]", blocks)):
        attn = block.norm_attn_norm.attn
        linears: list[nn.Module] = [attn.Wqkv, attn.out_proj]
        if all(isinstance(each, PackedLinear) and isinstance(each.kernel, NativeProducts) for each in linears):
            blocks[i] = NativeBlock(block, network.config)
    native = [block for block in blocks if isinstance(block, NativeBlock) and block.held is not None]
    if len(native) == len(blocks):
        network.transformer.at_once = NativeBlocks(native)


def _describe(block: NativeBlock, config: DbrxConfig, held: Experts | None) -> Block:
    half, ffn, d = block.norm_attn_norm, config.ffn_config, config.d_model
    Wqkv, out_proj = (typed("PackedLinear", linear).packed[0] for linear in (half.attn.Wqkv, half.attn.out_proj))
    norm, clip = ffn.moe_normalize_expert_weights, config.attn_config.clip_qkv
    norms = [address(each.weight.data, torch.float32, d, name="norm") for each in (half.norm_1, half.norm_2)]
    router = float_matrix(block.ffn.router.layer.weight.data)
    described = Block(
        d_model=d,
        heads=config.n_heads,
        kv_heads=config.attn_config.kv_n_heads,
        head_dim=config.head_dim,
        n_experts=ffn.moe_num_experts,
        top_k=ffn.moe_top_k,
        activation=ACTIVATIONS[str(ffn.activation)],
        normalize=int(norm is not None),
        norm_order=norm or 0,
        clip=math.inf if clip is None else clip,
        eps=EPS,
        norm_1=norms[0],
        norm_2=norms[1],
        Wqkv=Wqkv,
        out_proj=out_proj,
        router=router,
        experts=held.array if held is not None else None,
    )
    described.parts = Wqkv, out_proj, router, held  # that it points to
    return described
