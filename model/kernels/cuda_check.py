"""Triton's kernels against plain PyTorch in float64, on the card that is there: what `dbrx doctor` asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from ..config import DbrxAttentionConfig, DbrxConfig, DbrxFFNConfig
from ..experts import PackedExperts
from ..kv_cache import KVCache
from ..quantization import DENSE, dequantize
from ..transformer import DbrxBlock, DbrxModel
from ..weights import FloatExpert
from .base import Packed
from .cuda_block import CudaBlocks
from .cuda_glu import CudaGlu
from .cuda_linear import BITS, CudaLinear, CudaMatrix
from .linear import PackedLinear

EXACT, ROUNDED = 1e-4, 0.05  # of the largest number: sums in float32; keys, values and scores in bfloat16
TOKENS, TOP_K, BLOCK = 8, 2, 32  # of a step, of experts that a token chooses, of a block of keys and values
INPUTS, OUTPUTS, HIDDEN, EXPERTS = 96, 41, 38, 5


class Compared(NamedTuple):
    """Kernels by their names, how far their numbers are off, and how far they may be, of the largest one."""

    kernels: str
    error: float
    bound: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.bound  # NaN is not


def compare(device: torch.device) -> Iterator[Compared]:
    """Every kernel once, and each form of weights."""
    numbers = torch.Generator().manual_seed(0)
    for form in BITS:
        kernel = CudaLinear(form, device=device)
        yield from _products(kernel, numbers)
        yield _experts(CudaGlu(kernel, "silu"), numbers)
    yield _step(device, numbers)


def _products(kernel: CudaLinear, numbers: torch.Generator) -> Iterator[Compared]:
    packed, meant = _matrix(kernel, torch.randn(OUTPUTS, INPUTS, generator=numbers))
    x = torch.randn(TOKENS, INPUTS, generator=numbers)
    for rows in (x[:1], x):
        found = kernel.run(kernel.prepare(rows.to(kernel.device)), packed)
        many = "" if len(rows) == 1 else f", {len(rows)} tokens"
        yield Compared(f"gemv of {kernel.form}{many}", _error(found, rows.double() @ meant.t()), EXACT)
    if kernel.quantization != "none":
        floats = torch.cat(list(kernel.floats(cast(CudaMatrix, packed), torch.float32)))
        yield Compared(f"dequantize of {kernel.form}", _error(floats, meant), EXACT)


def _experts(kernel: CudaGlu, numbers: torch.Generator) -> Compared:
    floats = [[torch.randn(HIDDEN, INPUTS, generator=numbers) / 8 for _ in range(3)] for _ in range(EXPERTS)]
    packed, meant = zip(*(_expert(kernel, FloatExpert(*each)) for each in floats), strict=True)
    x, weights = torch.randn(2, INPUTS, generator=numbers), torch.rand(2, TOP_K, generator=numbers)
    ids = torch.stack([torch.randperm(EXPERTS, generator=numbers)[:TOP_K] for _ in x])
    exact = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            w1, v1, w2 = meant[expert]
            exact[token] += weight * (w2 @ (functional.silu(w1 @ row) * (v1 @ row)))
    tokens, chosen, shares = (each.to(kernel.linear.device) for each in (x, ids, weights))
    found = kernel.forward(tokens, chosen, shares, kernel.stack(packed))
    return Compared(f"gate_up and down of {kernel.linear.form}", _error(found, exact), EXACT)


def _step(device: torch.device, numbers: torch.Generator) -> Compared:
    """A layer, of rows that go on behind 37 and 64 tokens: all that lies between the products."""
    attention = DbrxAttentionConfig(kv_n_heads=2, clip_qkv=4)
    ffn = DbrxFFNConfig(ffn_hidden_size=HIDDEN, moe_num_experts=EXPERTS, moe_top_k=TOP_K)
    config = DbrxConfig(INPUTS, n_heads=6, n_layers=1, vocab_size=8, attn_config=attention, ffn_config=ffn)
    plain, there = DbrxModel(config, "eager").double(), DbrxModel(config, "eager").to(device)
    kept = torch.float32 if device.type == "cpu" else torch.bfloat16  # Triton's interpreter adds its bits
    there.set_kv_dtype(kept)
    linear, glu = CudaLinear(DENSE, device=device), CudaGlu(CudaLinear("int4", device=device), "silu")
    exact, block = (cast(DbrxBlock, each.blocks[0]) for each in (plain, there))
    with torch.no_grad():
        for weight in plain.parameters():
            spread = 0.2 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=numbers) * spread + (weight.dim() == 1))
        there.load_state_dict(plain.state_dict())
        for name in ("Wqkv", "out_proj"):
            weight = getattr(exact.norm_attn_norm.attn, name).weight
            packed, meant = _matrix(linear, weight.float())
            weight.copy_(meant)
            setattr(block.norm_attn_norm.attn, name, PackedLinear(linear, packed))
        stacked = [weight.view(EXPERTS, HIDDEN, INPUTS) for weight in exact.ffn.experts.parameters()]
        experts = []
        for w1, v1, w2 in zip(*stacked, strict=True):
            packed, meant_too = _expert(glu, FloatExpert(w1.float(), v1.float(), w2.float()))
            experts.append(packed)
            for weight, meant in zip((w1, v1, w2.t()), meant_too, strict=True):
                weight.copy_(meant)
    block.ffn.experts = PackedExperts(glu, experts)
    there.at_once = CudaBlocks([block], config, records=False)
    lengths, found = (37, 64), []  # within a block, and behind the last
    caches = [KVCache(1, len(lengths), BLOCK) for _ in range(2)]
    for row, length in enumerate(lengths):
        k, v = torch.randn(2, length, 2, config.head_dim, generator=numbers).to(kept)
        caches[0].rows[row].write(0, 0, k.double(), v.double())
        caches[1].rows[row].write(0, 0, k.to(device), v.to(device))
        for cache in caches:
            cache.rows[row].length = length
    with torch.inference_mode():
        for network, cache in zip((plain, there), caches, strict=True):
            ids = torch.tensor([[3], [6]], device=network.device)
            found.append(network(ids, past_key_values=cache).last_hidden_state)
    bound = EXACT if kept == torch.float32 else ROUNDED
    return Compared("norm, append, attend, merge and router", _error(found[1], found[0]), bound)


def _matrix(kernel: CudaLinear, weight: Tensor) -> tuple[Packed, Tensor]:
    """A matrix as the kernel holds it, and the float64 that is meant."""
    if kernel.quantization == "none":
        return kernel.pack(weight), weight.bfloat16().double()
    stored = kernel.quantize(weight)
    return kernel.load(stored), dequantize(kernel.quantization, stored, kernel.group).double().cpu()


def _expert(kernel: CudaGlu, floats: FloatExpert) -> tuple[Packed, list[Tensor]]:
    """The same of an expert: w1, v1, and w2 by its outputs."""
    if kernel.quantization == "none":
        return kernel.pack(floats), [w.bfloat16().double() for w in (floats.w1, floats.v1, floats.w2.t())]
    stored = kernel.quantize(floats)
    linear = kernel.linear
    return kernel.load(stored), [dequantize(linear.form, w, linear.group).double().cpu() for w in stored]


def _error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((found.double().cpu() - exact).abs().max() / exact.abs().max())
