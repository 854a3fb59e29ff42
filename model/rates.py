"""What the kernels of this machine reach with one token: the rates of a plan's prediction, measured in some seconds.

A tiny network is written, loaded as the real one would be, and run: so its kernels are those that a real one gets, and
what a layer of it takes is what a layer takes beside its weights. The same kernels then read weights enough for the
memory's speed, in the real shapes or, where these are too large for a probe, in the same proportions.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from .causal_lm import DbrxForCausalLM
from .config import DbrxConfig
from .experts import PackedExperts
from .formats import open_weights
from .formats.write_quantized import Writer
from .kernels import GluExpertKernel, LinearKernel, PackedLinear, choose, experts_of
from .kv_cache import KVCache
from .placement import FORMATS
from .prefill import prefill
from .quantization import BLOCKS, DENSE, GGUF, GROUP_FORMS
from .speed import Rates
from .weights import BlockMatrix, FloatExpert, GroupMatrix, KeptExpert, KeptMatrix, QuantizedExpert, QuantizedMatrix

LAYERS, WIDTH, HIDDEN, VOCAB, PROMPT = 6, 128, 32, 256, 16  # of the tiny network
NBYTES = 2**27  # of the weights that are read: much more than a processor's cache holds
ROUNDS = 12


def measure(config: DbrxConfig, format: str, streamed: bool = False, nbytes: int = NBYTES) -> Rates:
    """The rates of a format in `placement.FORMATS`, or of one that another program made: in `BLOCKS` or `GROUP_FORMS`.

    For networks like `config`, with experts in memory or streamed.
    """
    with tempfile.TemporaryDirectory(prefix="dbrx-plan-") as folder, torch.inference_mode():
        # What another program packed is computed with like int8, but for the products.
        is_kept = format in BLOCKS or format in GROUP_FORMS
        network = _tiny(config, DENSE if is_kept else format, streamed, Path(folder))
        if is_kept:
            linear = choose(GGUF if format in BLOCKS else GROUP_FORMS[format].scheme)
            assert linear is not None  # the plan asked the same
            kernel, dense = experts_of(linear, "silu"), _dense_kept(config, format, linear, nbytes)
        else:
            kernel = cast(GluExpertKernel, network.transformer.blocks[0].get_submodule("ffn.experts").kernel)
            dense = _dense(config, network, nbytes)
        experts, arrival = _experts(config, format, kernel, network.dtype, nbytes)
        return Rates(
            dense=dense,
            experts=experts,
            layer=_step(network) / LAYERS,
            arrival=arrival if streamed else 0.0,
        )


def _tiny(config: DbrxConfig, format: str, streamed: bool, folder: Path) -> DbrxForCausalLM:
    """A network with the same numbers of heads and experts whose weights are next to nothing."""
    width = config.n_heads * max(8, WIDTH // config.n_heads // 8 * 8)
    ffn = replace(config.ffn_config, ffn_hidden_size=HIDDEN)
    config = replace(config, d_model=width, n_layers=LAYERS, vocab_size=VOCAB, ffn_config=ffn)
    quantized = format.startswith("int")
    network = DbrxForCausalLM(config).to(torch.bfloat16 if quantized else getattr(torch, format))
    network.save_pretrained(folder / "floats")
    if quantized:
        with open_weights(folder / "floats") as weights:
            kind, _, group = format.partition("-g")
            Writer(weights, folder / kind, kind, int(group) if group else None).write(lambda _: None)
    (stored,) = (path for path in folder.iterdir() if not quantized or path.name != "floats")
    offload = "disk" if streamed else "none"
    return DbrxForCausalLM.from_pretrained(stored, offload=offload, pack=True)


def _step(network: DbrxForCausalLM) -> float:
    """Seconds of a decode step."""
    ids, cache = torch.randint(0, VOCAB, (1, PROMPT)), KVCache(network.config.n_layers)
    prefill(network, ids, cache)
    return _median(lambda i: network(ids[:, i % PROMPT, None], past_key_values=cache))


def _experts(
    config: DbrxConfig, format: str, kernel: GluExpertKernel, dtype: torch.dtype, nbytes: int
) -> tuple[float, float]:
    """Bytes a second of the experts of a token, and the seconds a byte that it takes to pack one."""
    top_k, block, groups = config.ffn_config.moe_top_k, BLOCKS.get(format), GROUP_FORMS.get(format)
    per_weight = _kept_bytes(format) if block or groups else FORMATS[format].experts
    width, hidden = _whole(config.d_model, format), _whole(config.ffn_config.ffn_hidden_size, format)
    largest = nbytes / top_k / per_weight
    if 3 * width * hidden > largest:
        width = max(256, int(width * sqrt(largest / (3 * width * hidden))) // 256 * 256)
        hidden = config.ffn_config.ffn_hidden_size * width // config.d_model
        hidden = _whole(max(32, hidden // 32 * 32), format)
    size = 3 * width * hidden * per_weight
    floats = FloatExpert(*(_random(hidden, width).to(dtype) for _ in range(3)))
    stored = kernel.quantize(floats) if format.startswith("int") else None
    sides = (hidden, width), (hidden, width), (width, hidden)
    held, arrivals = [], []
    for _ in range(max(top_k, int(nbytes / size))):
        mine: FloatExpert | QuantizedExpert | KeptExpert
        if block or groups:
            mine = KeptExpert(*(_kept(format, *each) for each in sides))
        else:
            mine = FloatExpert(*map(torch.clone, floats)) if stored is None else _copy(stored)
        start = time.perf_counter()
        held.append(kernel.pack(mine) if isinstance(mine, FloatExpert) else kernel.load(mine))
        arrivals.append(time.perf_counter() - start)
    experts, x = PackedExperts(kernel, held), torch.randn(1, width, dtype=dtype)
    even = torch.full((1, top_k), 1 / top_k, dtype=dtype)
    seconds = _median(lambda i: experts(x, torch.arange(i * top_k, (i + 1) * top_k)[None] % len(held), even))
    return top_k * size / seconds, statistics.median(arrivals) / size


def _dense(config: DbrxConfig, network: DbrxForCausalLM, nbytes: int) -> float:
    """Bytes a second of the kernel of attention and head."""
    kernels, width = network.kernels, config.d_model
    itemsize = 1 if kernels and kernels.quantize != "none" else network.kv_dtype.itemsize
    matrix = _random(max(1, nbytes // 2 // itemsize // width), width)
    run: Callable[[Tensor], Tensor] = partial(linear, weight=matrix.to(network.dtype))
    if kernels is not None:
        run = PackedLinear(kernels.dense, kernels.dense.pack(matrix))
    x = torch.randn(1, width, dtype=network.dtype)
    return matrix.numel() * itemsize / _median(lambda _: run(x))


def _dense_kept(config: DbrxConfig, format: str, kernel: LinearKernel, nbytes: int) -> float:
    """The same of a form that another program made."""
    width = _whole(config.d_model, format)
    matrix = _kept(format, int(nbytes / _kept_bytes(format)) // width, width)
    run, x = PackedLinear(kernel, kernel.load(matrix)), torch.randn(1, width)
    return len(matrix.values) * width * _kept_bytes(format) / _median(lambda _: run(x))


def _whole(inputs: int, format: str) -> int:
    """At least so many inputs, in whole blocks or groups: the format of most matrices of a file need not fit them all.

    A Q4_K_M file has Q5_0 where rows are no multiple of 256.
    """
    block, groups = BLOCKS.get(format), GROUP_FORMS.get(format)
    together = block.inputs if block else groups.group if groups else 1
    return -(-inputs // together) * together


def _kept_bytes(format: str) -> float:
    """Of a weight."""
    block = BLOCKS.get(format)
    return block.nbytes / block.inputs if block else GROUP_FORMS[format].bytes_per_weight


def _kept(format: str, rows: int, columns: int) -> KeptMatrix:
    """Bytes that are in memory, as zeros need not be."""
    if block := BLOCKS.get(format):
        return BlockMatrix(torch.ones(rows, columns // block.inputs * block.nbytes, dtype=torch.uint8), format)
    form = GROUP_FORMS[format]
    values = torch.ones(rows, columns * form.bits // 8, dtype=torch.uint8)
    scale = torch.ones(rows, -(-columns // form.group), dtype=torch.bfloat16)
    return GroupMatrix(values, scale, scale.clone(), form.bits, form.group)


def _random(rows: int, columns: int) -> Tensor:
    """Numbers as a network's, of which a part is random and then repeats: to draw so many would take seconds."""
    part = torch.randn(min(rows * columns, 2**20)) / sqrt(columns)
    return part.repeat(-(-rows * columns // len(part)))[: rows * columns].view(rows, columns)


def _copy(expert: QuantizedExpert) -> QuantizedExpert:
    parts = ([None if part is None else part.clone() for part in matrix] for matrix in expert)
    return QuantizedExpert(*(QuantizedMatrix(*cast(list[Tensor], matrix)) for matrix in parts))


def _median(work: Callable[[int], object]) -> float:
    """Seconds, after a few rounds to warm up."""
    seconds = []
    for i in range(ROUNDS + 4):
        start = time.perf_counter()
        work(i)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[4:])
