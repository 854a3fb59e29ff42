"""Experts streamed from other formats, or quantized on their way: the same to the bit as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from model.causal_lm import DbrxForCausalLM
from model.errors import ModelError
from model.experts.streamed import READING_AHEAD
from model.formats import open_weights
from model.formats.write_quantized import Writer
from model.kernels.torch_stored import StoredInt8Glu
from model.kv_cache import KVCache
from model.prefill import prefill
from model.quantization import SCHEMES, int8
from model.sampling import SamplingParams
from model.streaming import slot_size
from model.weights import QuantizedExpert, QuantizedMatrix
from tests.conftest import TINY
from tests.decoding import reply
from tests.gguf_files import CONFIG, write_gguf
from tests.weights import make_checkpoint

torch.set_num_threads(1)
GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPT = list(range(30, 70))
CACHE = 2**20  # bytes: a part of the experts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "tiny"
    return make_checkpoint(folder, TINY | {"vocab_size": 500}, seed=7, dtype="bfloat16")


def answer(source: Path, **options: Any) -> tuple[Tensor, list[int], DbrxForCausalLM]:
    network = DbrxForCausalLM.from_pretrained(source, **options)
    cache = KVCache(network.config.n_layers)
    logits = prefill(network, torch.tensor([PROMPT]), cache)
    tokens = reply(network, PROMPT, GREEDY, kv=cache.rows[0], logits=logits[0])
    return logits, tokens, network


def same(source: Path, budget: int = CACHE, within: float = 0, **options: Any) -> DbrxForCausalLM:
    """Streamed and resident agree, to the bit or `within` that share of the largest; gives the streamed network."""
    expected, expected_tokens, _ = answer(source, **options)
    logits, tokens, network = answer(source, offload="disk", expert_cache=budget, **options)
    store = network.expert_store
    assert store is not None and store.capacity < network.config.n_layers * network.config.ffn_config.moe_num_experts
    assert store.counters.misses > store.capacity
    assert float((logits - expected).abs().max()) <= within * float(expected.abs().max())
    assert within or tokens == expected_tokens
    return network


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_floats_that_are_quantized_on_their_way(tiny: Path, quantize: str) -> None:
    """More of them are held than floats would be, and they are packed once, not at each use."""
    # An expert that comes alone has few rows, whose activations are rounded otherwise than those of many.
    network = same(tiny, 240_000, within=0.03 if quantize == "int4" else 0, quantize=quantize)
    store = network.expert_store
    assert store is not None
    assert store.capacity * 3 * 48 * 40 * 2 > 240_000 - 4 * 6 * 4096
    assert store.counters.packed_s > 0


@pytest.mark.parametrize("kind", SCHEMES)
def test_quantized_checkpoints(tiny: Path, tmp_path: Path, kind: str) -> None:
    with open_weights(tiny) as weights:
        Writer(weights, tmp_path / kind, kind).write(lambda folder: None)
    # An expert that comes alone has few rows, whose activations are rounded otherwise than those of many.
    network = same(tmp_path / kind, 200_000, within=0.03)
    with open_weights(tmp_path / kind) as weights:
        extents = [weights.expert_extents(layer, expert) for layer in range(3) for expert in range(16)]
    assert all(len(expert) == 1 for expert in extents)  # one slice, one read
    store = network.expert_store
    assert store is not None
    beyond = store.counters.bytes_read - store.counters.misses * extents[0][0].nbytes
    assert 0 <= beyond <= store.counters.misses * 2 * 4096


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("width", [64, 48])
@pytest.mark.parametrize("apart", [0, 8, 24])
def test_int8_as_stored_computes_what_it_means(rows: int, width: int, apart: int) -> None:
    """Wherever in memory the bytes lie."""
    torch.manual_seed(0)
    matrices = [int8.quantize(torch.randn(shape) / 8) for shape in ((608, width), (608, width), (width, 608))]
    raw = [torch.empty(matrix.values.numel() + 128, dtype=torch.int8) for matrix in matrices]
    for i, (matrix, memory) in enumerate(zip(matrices, raw, strict=True)):
        start = -memory.data_ptr() % 64 + apart
        values = memory[start : start + matrix.values.numel()].view_as(matrix.values)
        matrices[i] = QuantizedMatrix(values.copy_(matrix.values), matrix.scale)
    w1, v1, w2 = (int8.dequantize(matrix) for matrix in matrices)
    x = torch.randn(50, width)
    chosen = torch.randperm(50)[:rows]
    kernel = StoredInt8Glu(silu)
    out = kernel.run(kernel.prepare(x), chosen, kernel.load(QuantizedExpert(*matrices)))
    exact = (silu(x[chosen] @ w1.t()) * (x[chosen] @ v1.t())) @ w2.t()
    assert out.dtype == torch.float32
    assert float((out - exact).abs().max()) < 0.01 * float(exact.abs().max())
    matrices[1].scale[7] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        kernel.load(QuantizedExpert(*matrices))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf(tmp_path: Path, kind: str, dtype: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind, CONFIG | {"vocab_size": 320})
    same(path, room(path, dtype), dtype=dtype)


def test_a_split_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "q8_0", split=5)
    same(path, room(path, "float32"), dtype="float32")


def room(path: Path, dtype: str) -> int:
    """Bytes for the slots that are read to, and for four experts in floats."""
    with open_weights(path) as weights:
        slot = slot_size([weights.expert_extents(layer, expert) for layer in range(2) for expert in range(5)])
    return READING_AHEAD * slot + 4 * 3 * 64 * 96 * (4 if dtype == "float32" else 2)
