"""Decoding on a card: a step of a token a row through all layers, in nine launches each, and nothing is waited for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import first_line
from ..experts import PackedExperts
from ..transformer import EPS, DbrxBlock, Step
from .cuda_attention import SPLITS, TILE, append_kernel, attend_kernel, merge_kernel
from .cuda_glu import CudaExperts, CudaGlu
from .cuda_linear import GEMV_MAX_TOKENS, CudaLinear, CudaMatrix
from .cuda_norm import AT_ONCE, norm_kernel, router_kernel
from .cuda_tiles import CHUNK, FUSED
from .linear import PackedLinear

if TYPE_CHECKING:
    from ..causal_lm import DbrxForCausalLM
    from ..config import DbrxConfig
    from ..kv_cache import KVCache, Pointers

KV_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass
class Inputs:
    """What a step of `rows` rows reads. Its tensors stay where they are, for a step that was recorded."""

    x: Tensor  # float32 [rows, d_model]
    cos: Tensor  # float32 [rows, head_dim]
    sin: Tensor
    positions: Tensor  # int32 [rows]
    table: Tensor  # int64 [layers, rows, 2, blocks], see `cuda_attention`
    held: list[Pointers]  # what the table points to
    warm: bool = False  # whether a step was computed, so that its kernels are compiled
    graph: torch.cuda.CUDAGraph | None = None  # the step, recorded
    outputs: tuple[Tensor, Tensor] | None = None  # of the recorded step

    @classmethod
    def make(cls, config: DbrxConfig, rows: int, blocks: int, device: torch.device) -> Inputs:
        x = torch.empty(rows, config.d_model, device=device)
        cos, sin = torch.empty(2, rows, config.head_dim, device=device)
        positions = torch.empty(rows, dtype=torch.int32, device=device)
        table = torch.zeros(config.n_layers, rows, 2, blocks, dtype=torch.int64, device=device)
        return cls(x, cos, sin, positions, table, [])


class CudaBlocks:
    """Computes decode steps of up to eight rows; what lies between two products is float32.

    On a card the second step of so many rows is recorded as a CUDA graph, and later ones replay it: the same kernels
    on the same numbers, without some 360 launches by Python. Where that fails, or where `records` is off, each step is
    launched.
    """

    runs_ahead = True

    def __init__(self, blocks: Sequence[DbrxBlock], config: DbrxConfig, records: bool = True) -> None:
        self.blocks, self.config = blocks, config
        half, experts = blocks[0].norm_attn_norm, cast(PackedExperts, blocks[0].ffn.experts)
        self.linear, self.glu = cast(CudaLinear, half.attn.Wqkv.kernel), cast(CudaGlu, experts.kernel)
        self.device = half.norm_1.weight.device
        # As one token of a row is cached.
        kept = half.attn.kv_dtype or half.norm_1.weight.dtype
        self.key = torch.empty(1, 1, half.attn.heads[-1], config.head_dim, dtype=kept, device=self.device)
        self.records = records and self.device.type == "cuda"
        self.fault = ""  # why none could be recorded
        self.inputs: dict[int, Inputs] = {}  # by rows

    @property
    def graph(self) -> str:
        """Whether steps are replayed, in words."""
        if not self.records:
            return f"off, it could not be recorded: {self.fault}" if self.fault else "off"
        return "recorded" if any(inputs.graph for inputs in self.inputs.values()) else "not recorded yet"

    def takes(self, step: Step) -> bool:
        """Whether it can compute a step."""
        plan = step.plan
        cached = step.cache is not None and not step.want_attentions and not step.keeps_hidden
        return cached and plan.one_each and len(plan.starts) <= GEMV_MAX_TOKENS

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """Write the new residual stream to x [n, 1, d_model]; gives router probabilities [blocks, n, experts]."""
        inputs = self._point(cast("KVCache", step.cache), step.plan.lengths)
        inputs.positions.copy_(self._sent(step.plan.starts, torch.int32), non_blocking=True)
        for to, of in ((inputs.x, x), (inputs.cos, cos), (inputs.sin, sin)):
            to.copy_(of.view(-1, to.shape[1]))
        with torch.cuda.device_of(x):
            out, probabilities = self._replay(inputs) if self.records else self._compute(inputs)
        x.copy_(out.view_as(x))
        return probabilities

    def _replay(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """`_compute`, from the second step of these inputs on recorded."""
        if inputs.warm and inputs.graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                # The outer one gives the stream back where a recording fails: then the inner one does not.
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                    inputs.outputs = self._compute(inputs)
                inputs.graph = graph
            except RuntimeError as error:  # the card's memory, or a driver that cannot
                self.records, self.fault = False, first_line(error)
        if inputs.graph is None or inputs.outputs is None:
            inputs.warm = True
            return self._compute(inputs)
        inputs.graph.replay()
        out, probabilities = inputs.outputs
        return out, probabilities.clone()  # the next replay writes there again

    def _point(self, cache: KVCache, lengths: Sequence[int]) -> Inputs:
        """The inputs of a step of that many rows, whose table has the blocks of these."""
        layers = range(len(self.blocks))
        rows = list(zip(cache.rows, lengths, strict=True))
        held = [row.pointers(layer, self.key, stop) for layer in layers for row, stop in rows]
        most, inputs = max(len(each.keys) for each in held), self.inputs.get(len(rows))
        if inputs is None or inputs.table.shape[-1] < most:
            room = max(triton.next_power_of_2(most), self.config.max_seq_len // cache.rows[0].block_tokens)
            inputs = self.inputs[len(rows)] = Inputs.make(self.config, len(rows), room, self.device)
        if inputs.held != held:
            blocks = inputs.table.shape[-1]
            table = [[*of, *[0] * (blocks - len(of))] for each in held for of in (list(each.keys), list(each.values))]
            inputs.table.copy_(self._sent(table, torch.int64).view(inputs.table.shape), non_blocking=True)
            inputs.held = held
        return inputs

    def _sent(self, numbers: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Numbers where a card fetches them by itself: from other memory the host copies them, and may wait for it."""
        return torch.tensor(numbers, dtype=dtype, pin_memory=self.device.type == "cuda")

    def _compute(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The residual stream behind all blocks [rows, d_model], and router probabilities [blocks, rows, experts]."""
        x, ffn, rows = inputs.x, self.config.ffn_config, len(inputs.x)
        probabilities = torch.empty(len(self.blocks), rows, ffn.moe_num_experts, device=self.device)
        for i, block in enumerate(self.blocks):
            half = block.norm_attn_norm
            y = self._attend(block, x, inputs, i)
            held = cast(CudaExperts, cast(PackedExperts, block.ffn.experts).held)
            chunks = held.like[0].chunks
            residual, normed = torch.empty_like(x), self._room(rows, self.glu.linear.bits, chunks)
            ids = torch.empty(rows, ffn.moe_top_k, dtype=torch.int32, device=self.device)
            weights = torch.empty(rows, ffn.moe_top_k, device=self.device)
            norm, router = ffn.moe_normalize_expert_weights, block.ffn.router.layer.weight
            router_kernel[(rows,)](
                x,
                y,
                half.norm_2.weight,
                router,
                residual,
                normed,
                probabilities[i],
                ids,
                weights,
                self.config.d_model,
                ffn.moe_num_experts,
                EPS,
                norm or 1.0,
                TOP_K=ffn.moe_top_k,
                NORMALIZE=norm is not None,
                E=triton.next_power_of_2(ffn.moe_num_experts),
                K=triton.next_power_of_2(ffn.moe_top_k),
                W=triton.next_power_of_2(normed.shape[1] * chunks),
                AT_ONCE=min(AT_ONCE, triton.next_power_of_2(self.config.d_model)),
                CHUNKS=chunks,
                BITS=self.glu.linear.bits,
                num_warps=8,
                **FUSED,
            )
            x = self.glu.decode(normed, ids, weights, held, residual)
        return x, probabilities

    def _attend(self, block: DbrxBlock, x: Tensor, inputs: Inputs, layer: int) -> Tensor:
        """What attention adds to the residual stream x."""
        half, config, bits = block.norm_attn_norm, self.config, self.linear.bits
        Wqkv, out_proj = (cast(CudaMatrix, each.packed) for each in (half.attn.Wqkv, half.attn.out_proj))
        rows, heads, kv_heads = len(x), config.n_heads, half.attn.heads[-1]
        normed = self._room(rows, bits, Wqkv.chunks)
        places = triton.next_power_of_2(normed.shape[1] * Wqkv.chunks)
        of_inputs = {"CHUNKS": Wqkv.chunks, "BITS": bits, **FUSED}
        norm_kernel[(rows,)](x, half.norm_1.weight, normed, config.d_model, EPS, W=places, num_warps=8, **of_inputs)
        qkv = self.linear.gemv(normed, rows, Wqkv)

        clip = math.inf if half.attn.clip is None else float(half.attn.clip)
        D = max(16, triton.next_power_of_2(config.head_dim))
        table, (tokens, *_) = inputs.table[layer], inputs.held
        same = {"HEADS": heads, "KV_HEADS": kv_heads, "D": D, "BLOCKS": table.shape[-1], **FUSED}
        same |= {"TOKENS": tokens.room // len(tokens.keys), "KV": KV_TYPES[self.key.dtype]}
        begin = qkv, inputs.cos, inputs.sin, inputs.positions, table
        append_kernel[rows, kv_heads](*begin, clip, config.head_dim, num_warps=1, **same)
        sums = torch.empty(rows, heads, SPLITS, config.head_dim, device=self.device)
        tops, totals = torch.empty(2, rows, heads, SPLITS, device=self.device)
        attend_kernel[rows, kv_heads, SPLITS](
            *begin,
            sums,
            tops,
            totals,
            clip,
            config.head_dim**-0.5,
            config.head_dim,
            GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),
            SPLITS=SPLITS,
            TILE=min(TILE, same["TOKENS"]),
            num_warps=4,
            **same,
        )
        attended = self._room(rows, bits, out_proj.chunks)
        of_outputs = {"CHUNKS": out_proj.chunks, "BITS": bits, **FUSED}
        merge_kernel[rows, heads](
            sums, tops, totals, attended, config.head_dim, HEADS=heads, D=D, SPLITS=SPLITS, num_warps=2, **of_outputs
        )
        return self.linear.gemv(attended, rows, out_proj)

    def _room(self, rows: int, bits: int, chunks: int) -> Tensor:
        """For tokens that a kernel prepares; what fills up the last chunk is zero."""
        shape = rows, CHUNK // bits, chunks
        whole = self.config.d_model == shape[1] * chunks
        return (torch.empty if whole else torch.zeros)(shape, device=self.device)


def decode_on_card(network: DbrxForCausalLM, records: bool = True) -> None:
    """Let decode steps of a network be computed at once, where all of it lies in its card's kernels' form.

    records: as CUDA graphs.
    """
    blocks = list(cast("Iterator[DbrxBlock]", network.transformer.blocks))
    if all(_is_on_card(block) for block in blocks):
        network.transformer.at_once = CudaBlocks(blocks, network.config, records)


def _is_on_card(block: DbrxBlock) -> bool:
    attn, experts = block.norm_attn_norm.attn, block.ffn.experts
    linears = [each.kernel for each in (attn.Wqkv, attn.out_proj) if isinstance(each, PackedLinear)]
    norm = block.ffn.router.norm
    return (
        len(linears) == 2
        and all(isinstance(each, CudaLinear) for each in linears)
        and isinstance(experts, PackedExperts)
        and isinstance(experts.kernel, CudaGlu)
        and (norm is None or 0 < norm < math.inf)
    )
