"""Networks whose products and decode steps are native: against PyTorch's kernels, float64, and themselves."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.synchronize
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import DbrxForCausalLM, KVCache, kernels, native, quantization
from model.formats import open_weights
from model.formats.write_quantized import Writer
from model.kernels.native_block import NativeBlock
from model.kernels.native_linear import NativeLinear
from model.kv_cache import KVRow
from model.native.abi import GEMV_MAX_ROWS
from model.prefill import prefill
from model.quantization import SCHEMES, int8
from tests.cli import Cli

needs_native = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")
PROMPT = torch.arange(100, 140)[None]
STEPS = 5
BLOCK = 21  # two of these are full in the middle of the steps
GROUPED = [(name, group) for name, scheme in SCHEMES.items() for group in scheme.groups]
FORMS = [("float32", 0), ("bfloat16", 0), ("int8", 0), *GROUPED]
CLOSE = {
    "float32": 1e-6,
    "bfloat16": 1e-6,
    "int8": 1e-4,
    "int4": 0.01,
    "int3": 0.01,
}  # error of a product, as a share of that of the norms


# Many rows are rounded to what the processor multiplies: to 16 bits, or to bytes and bfloat16.
IN_BYTES = native.status().variant in ("avx512", "neon")
MANY_CLOSE = {"int8": 5e-3, "bfloat16": 5e-3} if IN_BYTES else {"bfloat16": 1e-4}


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DBRX_NATIVE", "none")
    kernels.choose.cache_clear()
    yield
    kernels.choose.cache_clear()


@torch.inference_mode()
def decoded(network: DbrxForCausalLM, follow: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of the prompt, after it, and after each of some tokens; and these: the likeliest, or those of `follow`."""
    cache = KVCache(network.config.n_layers, block_tokens=BLOCK)
    rows, ids = [network(PROMPT).logits[0].float()], []
    rows.append(prefill(network, PROMPT, cache).float())
    for step in range(STEPS):
        ids.append(rows[-1].argmax(-1) if follow is None else follow[step])
        rows.append(network(ids[-1][:, None], past_key_values=cache).logits[:, -1].float())
    return torch.cat(rows), torch.stack(ids)


@pytest.fixture(scope="module")
def exact(small_checkpoint: Path) -> tuple[Tensor, Tensor]:
    return decoded(DbrxForCausalLM.from_pretrained(small_checkpoint, dtype="float32"))


@needs_native
@pytest.mark.parametrize(("form", "group"), FORMS)
@pytest.mark.parametrize("shape", [(48, 40), (7, 46), (33, 1000)])
def test_a_product_is_that_of_float64(form: str, group: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    if form == "int3":  # inputs in eights
        shape = shape[0], shape[1] // 8 * 8
    weight, kernel = torch.randn(shape), NativeLinear(form, group)
    if form == "int8":
        meant, packed = int8.dequantize(stored := int8.quantize(weight)), kernel.load(stored)
    elif group:
        stored = quantization.quantize(form, group, weight)
        meant, packed = quantization.dequantize(form, stored, group), kernel.load(stored)
    else:
        meant, packed = weight.to(getattr(torch, form)), kernel.pack(weight)
    x = torch.randn(40, shape[1])
    x[3, 5] = 200  # an outlier, in a row of its own
    exact, norms = x.double() @ meant.double().t(), x.double().norm(dim=1)[:, None] * meant.double().norm(dim=1)
    for n in (1, 2, 5, 16, 40):
        found = kernel.run(kernel.prepare(x[:n]), packed)
        close = CLOSE[form]
        if n > GEMV_MAX_ROWS:
            close = max(close, MANY_CLOSE.get(form, 0))
        assert ((found - exact[:n]).abs() <= close * norms[:n]).all(), n
        if n <= 16:
            assert torch.equal(found[:1], kernel.run(kernel.prepare(x[:1]), packed))


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize(
    ("quantize", "dtype", "within"),
    [("none", "float32", 1.1), ("none", "auto", 1.1), ("int8", "auto", 1.1), ("int4", "auto", 1.1)],
)
def test_as_near_to_float32_as_pytorchs_kernels(
    small_checkpoint: Path,
    exact: tuple[Tensor, Tensor],
    quantize: str,
    dtype: str,
    within: float,
    offload: str,
    request: pytest.FixtureRequest,
) -> None:
    options = {"quantize": quantize, "dtype": dtype, "offload": offload, "pack": True}
    meant, ids = exact
    network = DbrxForCausalLM.from_pretrained(small_checkpoint, **options)
    assert all(isinstance(block, NativeBlock) for block in network.transformer.blocks)
    found, _ = decoded(network, ids)
    if offload == "disk" and dtype == "float32":
        resident, _ = decoded(DbrxForCausalLM.from_pretrained(small_checkpoint, **options | {"offload": "none"}), ids)
        assert (found - resident).norm() < 1e-4 * resident.norm()
    request.getfixturevalue("without_native")
    plain = DbrxForCausalLM.from_pretrained(small_checkpoint, **options)
    assert not any(isinstance(block, NativeBlock) for block in plain.transformer.blocks)
    bound = (decoded(plain, ids)[0] - meant).norm()
    assert (found - meant).norm() <= max(1e-5 * meant.norm(), within * bound)


@needs_native
@torch.inference_mode()
def test_a_row_of_a_batch_is_the_row_alone(tiny_checkpoint: Path) -> None:
    """To the bit, though each row is at a place of its own."""
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, quantize="int8", pack=True)
    rows, alone = [], []
    for length in (3, 17, 9):
        cache = KVCache(network.config.n_layers)
        prefill(network, PROMPT[:, :length], cache)
        rows.append(KVRow(network.config.n_layers))
        rows[-1].take(cache.rows[0], length)
        alone.append(cache)
    together = KVCache.of(rows)
    column = torch.tensor([[5], [6], [7]])
    for _ in range(3):
        logits = network(column, past_key_values=together).logits
        for row, cache in enumerate(alone):
            assert torch.equal(network(column[row : row + 1], past_key_values=cache).logits[0], logits[row])
        column = logits[:, -1].argmax(-1)[:, None]


@needs_native
@torch.inference_mode()
@pytest.mark.parametrize("quantize", ["int8", "none"])
def test_drafted_tokens_are_those_of_decoding_one_by_one(tiny_checkpoint: Path, quantize: str) -> None:
    """To the bit: several tokens of one row in one step, beside another row, in blocks that end within the step."""
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, quantize=quantize, pack=True)
    caches = [KVCache(network.config.n_layers, block_tokens=BLOCK) for _ in range(4)]
    for cache, length in zip(caches, (19, 5, 19, 5), strict=True):
        prefill(network, PROMPT[:, :length], cache)
    column = torch.tensor([[5], [6], [7], [8], [9]])
    (mine,), (other,) = caches[0].rows, caches[1].rows
    together = network(column, past_key_values=KVCache.of([mine, mine, mine, mine, other], [0, 1, 2, 3, 0])).logits
    for i, token in enumerate(column):
        assert torch.equal(network(token[None], past_key_values=caches[2 if i < 4 else 3]).logits[0], together[i])
    assert mine.length == 23 and other.length == 6
    for layer in range(network.config.n_layers):
        for ours, theirs in zip(mine.read(layer, 0, 23), caches[2].rows[0].read(layer, 0, 23), strict=True):
            assert torch.equal(ours, theirs)


@needs_native
@torch.inference_mode()
def test_what_a_step_shows_is_what_the_blocks_compute(tiny_checkpoint: Path) -> None:
    """Hidden states, routers and attentions of a step, against those of the same tokens read at once."""
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32", pack=True)
    asked = {"output_hidden_states": True, "output_router_logits": True}
    whole = network(PROMPT, output_attentions=True, **asked)
    cache = KVCache(network.config.n_layers)
    prefill(network, PROMPT[:, :-1], cache)
    step = network(PROMPT[:, -1:], past_key_values=cache, **asked)
    for ours, theirs in zip(step.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(ours[:, -1], theirs[:, -1], rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(step.router_logits, whole.router_logits, strict=True):
        torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-3, atol=1e-5)
    cache.trim(0, len(cache) - 1)
    shown = network(PROMPT[:, -1:], past_key_values=cache, output_attentions=True)
    torch.testing.assert_close(shown.attentions[0][..., -1, :], whole.attentions[0][..., -1, :], rtol=1e-3, atol=1e-5)
    cache.trim(0, len(cache) - 1)
    embedded = network.transformer.wte(PROMPT[:, -1:]).float()
    before = embedded.clone()
    again = network(inputs_embeds=embedded, past_key_values=cache)
    assert torch.equal(embedded, before) and torch.equal(again.logits, step.logits)


def _child(network: DbrxForCausalLM, ids: Tensor, expected: Tensor, done: multiprocessing.synchronize.Event) -> None:
    with torch.inference_mode():
        if torch.equal(network(ids).logits, expected):
            done.set()


@needs_native
def test_a_forked_child_has_threads_of_its_own(tiny_checkpoint: Path) -> None:
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, quantize="int8", pack=True)
    column = PROMPT[:, :1]
    with torch.inference_mode():
        expected = network(column).logits
    context = multiprocessing.get_context("fork")
    done = context.Event()
    child = context.Process(target=_child, args=(network, column, expected, done))
    child.start()
    child.join(60)
    assert done.is_set()


@needs_native
@pytest.mark.parametrize("kind", [*SCHEMES, "none"])
def test_what_is_stored_is_read_where_the_file_is_mapped(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint
    if kind != "none":
        folder = tmp_path / kind
        with open_weights(tiny_checkpoint) as weights:
            Writer(weights, folder, kind).write(lambda written: None)
    network = DbrxForCausalLM.from_pretrained(folder, pack=True)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    areas = [tuple(int(end, 16) for end in area.split("-")) for area, *_ in mapped]
    for block in network.transformer.blocks:
        for matrix in (*block.ffn.experts.held.matrices[3], *block.norm_attn_norm.attn.Wqkv.packed):
            assert any(start <= matrix.values < end for start, end in areas)


@pytest.mark.slow
def test_without_a_native_library_all_is_computed_by_pytorch(
    cli: Cli, small_checkpoint: Path, without_native: None
) -> None:
    for quantize in ("none", "int8", "int4"):
        found = cli("generate", "-m", small_checkpoint, "--raw", "-n", "3", "Hello", "--json", "--quantize", quantize)
        assert found.code == 0 and json.loads(found.out)["quantize"] == quantize
    assert "native" not in " ".join(kernels.probe().values())
