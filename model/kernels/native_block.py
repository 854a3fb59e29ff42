"""Decoding through the native library: a step of a token a row is one call a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from ctypes import POINTER, byref, c_void_p, cast, sizeof
from typing import TYPE_CHECKING, Any
from typing import cast as typed

import torch
from torch import Tensor, nn

from ..native.abi import GEMV_MAX_ROWS, KV, Block, Format
from ..native.tensors import Experts, address
from ..transformer import EPS, DbrxBlock, Step
from .linear import PackedLinear
from .native_call import ACTIVATIONS, float_matrix, function
from .native_linear import NativeLinear

if TYPE_CHECKING:
    from ..causal_lm import DbrxForCausalLM
    from ..config import DbrxConfig

KV_FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}


class NativeBlock(DbrxBlock):
    """Takes the parts of a packed block over. A step of a token a row goes through one call, all else as it did.

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
        self.attend, self.step = function("dbrx_attend"), function("dbrx_block_step")
        self.n_experts, self.top_k = config.ffn_config.moe_num_experts, config.ffn_config.moe_top_k
        self.weights = torch.empty(GEMV_MAX_ROWS, self.top_k)
        self.ids = torch.empty(GEMV_MAX_ROWS, self.top_k, dtype=torch.int32)
        self.table = _Table(self.key)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        plan, cache = step.plan, step.cache
        n = len(plan.starts)
        if cache is None or not plan.one_each or step.want_attentions or n > GEMV_MAX_ROWS:
            return super().forward(x, cos, sin, step)
        keys, values = cache.room(self.layer, self.key, plan.kv_len)
        self.table.point(keys, values, plan.starts, cos, sin)
        x = x.clone(memory_format=torch.contiguous_format) if step.keeps_hidden else x
        probabilities = torch.empty(n, self.n_experts)
        inputs = self.block, n, self.table.rows, x.data_ptr()
        outputs = probabilities.data_ptr(), self.weights.data_ptr(), self.ids.data_ptr()
        if self.held is not None:
            self.step(*inputs, *outputs)
            return x, probabilities, None
        normed = torch.empty(n, x.shape[-1])
        self.attend(*inputs, normed.data_ptr(), *outputs)
        return x + self.ffn.experts(normed, self.ids[:n], self.weights[:n]).view_as(x), probabilities, None


class _Table:
    """Where the keys and values of a layer's rows lie: a `native.KV` a row, each with a table of one block."""

    def __init__(self, key: Tensor) -> None:
        self.rows = (KV * GEMV_MAX_ROWS)()
        self._each = list(self.rows)
        self._pointers = (c_void_p * (2 * GEMV_MAX_ROWS))()  # of keys and values, row by row
        for i, row in enumerate(self._each):
            row.keys, row.values = (self._pointer(2 * i + part) for part in range(2))
            row.format = KV_FORMATS[key.dtype]
        self._angles = key.shape[-1] * torch.float32.itemsize
        self._of: tuple[int, ...] = ()  # the buffers that it points to

    def point(self, keys: Tensor, values: Tensor, starts: list[int], cos: Tensor, sin: Tensor) -> None:
        """keys, values [rows, capacity, kv_heads, head_dim] of a cache; cos, sin [rows, 1, 1, head_dim]."""
        buffers = keys.data_ptr(), values.data_ptr(), keys.shape[1], len(starts)
        if buffers != self._of:
            self._of = buffers
            for i, row in enumerate(self._each[: len(starts)]):
                self._pointers[2 * i] = buffers[0] + i * keys.stride(0) * keys.element_size()
                self._pointers[2 * i + 1] = buffers[1] + i * values.stride(0) * values.element_size()
                row.block_tokens, row.token_stride, row.head_stride = keys.shape[1], keys.stride(1), keys.stride(2)
        at_cos, at_sin = cos.data_ptr(), sin.data_ptr()
        for row, start in zip(self._each, starts):  # noqa: B905  # there are more places than rows
            row.position, row.cos, row.sin = start, at_cos, at_sin
            at_cos, at_sin = at_cos + self._angles, at_sin + self._angles

    def _pointer(self, i: int) -> Any:
        at = c_void_p.from_buffer(self._pointers, i * sizeof(c_void_p))
        return cast(byref(at), POINTER(c_void_p))


def decode_natively(network: DbrxForCausalLM) -> None:
    """Let decode steps of a network go through the native library, where that holds its matrices."""
    blocks = network.transformer.blocks
    for i, block in enumerate(typed("Iterator[DbrxBlock]", blocks)):
        attn = block.norm_attn_norm.attn
        linears: list[nn.Module] = [attn.Wqkv, attn.out_proj]
        if all(isinstance(each, PackedLinear) and isinstance(each.kernel, NativeLinear) for each in linears):
            blocks[i] = NativeBlock(block, network.config)


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
