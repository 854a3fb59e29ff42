"""Experts on a card: a decode step's chosen ones in two launches, with ids and weights that stay there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ..weights import QuantizedExpert, QuantizedMatrix
from .base import Packed
from .cuda_linear import GEMV_MAX_TOKENS, CudaLinear, CudaMatrix, Tile, prepared, tile
from .cuda_tiles import FUSED, add_products, place_of, pointer
from .dispatch import Dispatched
from .torch_glu import LinearsGlu

if TYPE_CHECKING:
    from ..weights import FloatExpert

DOWN = Tile(16, 32, 4, 120)  # a thread has four outputs: with eight, in a loop over experts, registers are spilled


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """silu, gelu or relu, as PyTorch has them: NaN stays NaN."""
    if ACTIVATION == "silu":
        return x / (1 + tl.exp(-x))
    if ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    return tl.where(x < 0, 0, x)


@triton.jit
def gate_up_kernel(
    x,
    expert_ids,
    table,
    inner,
    hidden,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
    INNER_CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """inner: act(w1 x) * (v1 x) of each pair of a token and an expert that it chose, prepared for w2.

    x: tokens, prepared; expert_ids [tokens, top_k]; table: addresses of each expert's `CudaMatrix` of w1 above v1 and
    of w2. A program makes N / 2 of a pair's `hidden` numbers: its rows are in turn of w1 and of v1, so that a thread
    has both and loads the token once. Pairs come first, so that tokens which chose the same expert read its weights at
    about the same time, from the second cache. Of an expert that lies elsewhere nothing is computed.
    """
    pair = tl.program_id(0)
    address = table + tl.load(expert_ids + pair) * 4
    lies = tl.load(address)
    if lies == 0:
        return
    values, ranges = pointer(lies), pointer(tl.load(address + 1))
    token, is_token = tl.full([1], pair // TOP_K, tl.int32), tl.full([1], 1, tl.int1)
    first = tl.program_id(1) * (N // 2)
    i = first + tl.arange(0, N) // 2
    row, is_row = i + tl.arange(0, N) % 2 * hidden, i < hidden
    sums = tl.zeros([1, N, C], tl.float32)
    for start in range(0, CHUNKS, C):
        sums = add_products(sums, x, token, is_token, values, ranges, row, is_row, start, CHUNKS, BITS, GROUP)
    found = tl.sum(sums, axis=2)
    if BITS == 8:
        found *= tl.load(ranges.to(tl.pointer_type(tl.float32)) + row, mask=is_row, other=0)[None]
    gate, up = tl.split(tl.reshape(found, [N // 2, 2]))
    i = first + tl.arange(0, N // 2)
    at = inner + pair.to(tl.int64) * (128 // BITS * INNER_CHUNKS) + place_of(i, INNER_CHUNKS, BITS)
    # What fills up the last chunk must be zero: its weights are, but zero times what was there before may be NaN.
    gated = tl.where(i < hidden, activated(gate, ACTIVATION) * up, 0)
    tl.store(at, gated, mask=i < INNER_CHUNKS * (128 // BITS))


@triton.jit
def down_kernel(
    inner,
    expert_ids,
    router_weights,
    table,
    residual,
    out,
    d_model,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out [tokens, d_model] = residual + the weighted sum of w2 inner over the experts of a token, in their order."""
    token = tl.program_id(0)
    row = tl.program_id(1) * N + tl.arange(0, N)
    is_row, is_pair = row < d_model, tl.full([1], 1, tl.int1)
    at = token.to(tl.int64) * d_model + row
    total = tl.load(residual + at, mask=is_row, other=0)[None]
    for k in range(TOP_K):
        pair = token * TOP_K + k
        address = table + tl.load(expert_ids + pair) * 4 + 2
        lies = tl.load(address)
        if lies != 0:
            values, ranges = pointer(lies), pointer(tl.load(address + 1))
            which, sums = tl.full([1], 0, tl.int32) + pair, tl.zeros([1, N, C], tl.float32)
            for start in range(0, CHUNKS, C):
                sums = add_products(
                    sums, inner, which, is_pair, values, ranges, row, is_row, start, CHUNKS, BITS, GROUP
                )
            found = tl.sum(sums, axis=2)
            if BITS == 8:
                found *= tl.load(ranges.to(tl.pointer_type(tl.float32)) + row, mask=is_row, other=0)[None]
            total += tl.load(router_weights + pair) * found
    tl.store((out + at)[None], total, mask=is_row[None])


class CudaExperts:
    """A layer's experts, and on their device a table of where their matrices lie: [experts, 4] addresses, or zeros."""

    def __init__(self, experts: Sequence[tuple[CudaMatrix, CudaMatrix] | tuple[()]]) -> None:
        self.experts = experts
        self.like = next(expert for expert in experts if expert)  # in its shapes
        addresses = [[part.data_ptr() for matrix in expert for part in matrix[:2]] or [0] * 4 for expert in experts]
        self.table = torch.tensor(addresses, device=self.like[0].values.device)


class CudaGlu(LinearsGlu):
    """w1 above v1, and w2 by its outputs. Up to eight tokens in two launches; of more, one expert after the other."""

    def __init__(self, linear: CudaLinear, activation: str) -> None:
        super().__init__(linear, getattr(functional, activation))
        self.linear = linear
        self.function = activation

    def pack(self, expert: FloatExpert) -> Packed:
        return super().pack(self._sent(expert))

    def quantize(self, expert: FloatExpert) -> QuantizedExpert:
        return super().quantize(self._sent(expert))

    def _sent(self, expert: FloatExpert) -> FloatExpert:
        """On the card, which turns its w2 and quantizes it: its floats are there meanwhile."""
        return type(expert)(*(matrix.to(self.linear.device, non_blocking=True) for matrix in expert))

    def stored(self, packed: Packed) -> QuantizedExpert | None:
        if self.quantization == "none":
            return None
        both, w2 = (self.linear.stored(cast(CudaMatrix, matrix)) for matrix in packed)
        halves = [part.chunk(2) for part in both if part is not None]
        w1, v1 = (QuantizedMatrix(*parts) for parts in zip(*halves, strict=True))
        return QuantizedExpert(w1, v1, w2)

    def stack(self, experts: Sequence[Packed]) -> Any:
        return CudaExperts([cast("tuple[CudaMatrix, CudaMatrix] | tuple[()]", expert) for expert in experts])

    def forward(self, x: Tensor, expert_ids: Tensor, router_weights: Tensor, held: Any) -> Tensor:
        if len(x) > GEMV_MAX_TOKENS:
            return Dispatched.forward(self, x, expert_ids, router_weights, list(held.experts))
        first = held.like[0]
        tokens = prepared(x, self.linear.bits, first.chunks)
        zeros = torch.zeros(len(x), first.inputs, device=x.device)
        return self.decode(tokens, expert_ids, router_weights.float(), held, zeros).to(x.dtype)

    def decode(
        self, x: Tensor, expert_ids: Tensor, router_weights: Tensor, held: CudaExperts, residual: Tensor
    ) -> Tensor:
        """residual [tokens, d_model] and the experts' weighted sum, of one to eight tokens x, prepared; in float32."""
        (tokens, top_k), (first, second), bits = expert_ids.shape, held.like, self.linear.bits
        made = tile(1, bits)
        hidden, d_model = second.inputs, second.outputs
        inner = torch.empty(tokens * top_k, 128 // bits, second.chunks, device=x.device)
        grid = tokens * top_k, triton.cdiv(second.chunks * (128 // bits), made.N // 2)
        shape = {"TOP_K": top_k, "BITS": bits, "GROUP": self.linear.group, **FUSED}
        out = torch.empty_like(residual)
        with torch.cuda.device_of(x):
            gate_up_kernel[grid](
                x,
                expert_ids,
                held.table,
                inner,
                hidden,
                ACTIVATION=self.function,
                CHUNKS=first.chunks,
                INNER_CHUNKS=second.chunks,
                **made._asdict(),
                **shape,
            )
            shape |= {"CHUNKS": second.chunks, **DOWN._asdict()}
            down_kernel[tokens, triton.cdiv(d_model, DOWN.N)](
                inner, expert_ids, router_weights, held.table, residual, out, d_model, **shape
            )
        return out
