"""Weights of GGUF files that are computed with in their own blocks: against the gguf package's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_cli.bench import bytes_per_token
from model import native
from model.causal_lm import DbrxForCausalLM
from model.formats import open_weights
from model.kernels.native_kept import KeptEmbedding, NativeKept
from model.kv_cache import KVCache
from model.load_plan import LoadOptions
from model.loading import plan_here
from model.quantization import BLOCKS, GGUF, blocks
from model.weights import BlockMatrix
from tests import make_native_vectors
from tests.gguf_files import CONFIG, write_gguf

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels")

FFN = CONFIG["ffn_config"] | {"ffn_hidden_size": 512}
WIDE: dict[str, Any] = CONFIG | {"d_model": 256, "n_heads": 8, "ffn_config": FFN}  # rows of whole blocks of 256
PROMPT = torch.randint(0, 300, (1, 21), generator=torch.Generator().manual_seed(7))
# All experts are chosen: of two that are almost alike rounding would choose one, and its logits would be others.
SMALL = WIDE | {"ffn_config": FFN | {"ffn_hidden_size": 256, "moe_num_experts": 2}}
# Types of most matrices, then of w2 and the head, as mixes have them; MXFP4 has no kernel and becomes floats.
MIXES = {
    "Q4_0": ("Q4_1", "Q6_K"), "Q4_1": ("Q8_0", "MXFP4"), "Q5_0": ("Q5_1", "Q8_0"), "Q5_1": ("Q5_1", "Q5_1"),
    "Q8_0": ("Q8_0", "Q8_0"), "IQ4_NL": ("Q4_0", "Q5_0"), "IQ4_XS": ("Q5_K", "Q5_K"), "Q2_K": ("Q3_K", "Q6_K"),
    "Q3_K": ("Q4_K", "Q6_K"), "Q4_K": ("Q6_K", "Q6_K"), "Q5_K": ("Q6_K", "IQ4_XS"), "Q6_K": ("Q6_K", "IQ4_NL"),
}  # fmt: skip
# Products take a row in whole numbers up to 16,383, or up to 32,766 where rows are few (gemm_spans.h, spans.h).
# Rounding errs by 1 / sqrt(12) of a step, as a root mean square: of a row's norm by 8 / (16,383 sqrt(12)), if no number
# is more than 8 times the root mean square. Two layers have nine products behind each other: sqrt(9) times that.
MANY_ROWS = 3 * 8 / (16383 * 12**0.5)
FEW_ROWS = MANY_ROWS / 2


def mixed(path: Path, kind: str, config: dict[str, Any] = WIDE) -> Path:
    down, head = MIXES[kind]
    others = {"ffn_down_exps.weight": down, ".output.weight": head, "output.weight": head}
    return write_gguf(path, kind, config, others=others)


def random_blocks(kind: str, outputs: int, inputs: int, seed: int) -> BlockMatrix:
    """Any bytes: every level and every scale there can be."""
    return BlockMatrix(torch.from_numpy(make_native_vectors.blocks(seed, kind, outputs, inputs)), kind)


@pytest.mark.parametrize("kind", BLOCKS)
def test_weights_are_the_packages_to_the_bit(kind: str) -> None:
    stored = random_blocks(kind, 33, 512 if BLOCKS[kind].inputs == 256 else 288, seed=7)
    found = KeptEmbedding(stored)(torch.arange(33))
    assert torch.equal(found.view(torch.int32), blocks.dequantize(stored).view(torch.int32))


@pytest.mark.parametrize("kind", BLOCKS)
def test_products_of_few_and_many_rows(kind: str) -> None:
    stored, kernel = random_blocks(kind, 50, 512, seed=9), NativeKept(GGUF)
    exact = blocks.dequantize(stored).double()
    rows = [torch.randn(n, 512, generator=torch.Generator().manual_seed(n)) for n in (1, 7, 40)]
    rows.append(exact.float())  # no rows of their norm give larger sums, which integers of 32 bits have to hold
    for x, bound in zip(rows, (5e-5, 5e-5, 2e-4, 2e-4), strict=True):
        out = kernel.run(kernel.prepare(x), kernel.load(stored))
        wanted = x.double() @ exact.t()
        assert (out - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("kind", MIXES)
def test_a_network_gives_the_logits_and_tokens_of_its_values(tmp_path: Path, kind: str) -> None:
    """In float32, of the values that the gguf package finds."""
    path = mixed(tmp_path / "m.gguf", kind, SMALL)
    with torch.inference_mode():  # which threads that read do not inherit
        exact = DbrxForCausalLM.from_pretrained(path, dtype="float32")
    network = DbrxForCausalLM.from_pretrained(path, quantize="none", pack=True)
    assert network.load_plan is not None and (network.load_plan.scheme, network.load_plan.format) == (GGUF, kind)
    with torch.inference_mode():
        ids, found = (
            each.generate(PROMPT, max_new_tokens=24, do_sample=False, eos_token_id=[]) for each in (exact, network)
        )
        assert torch.equal(found, ids) and ids.shape[1] == PROMPT.shape[1] + 24
        wanted, read, cache = exact(ids).logits, network(ids).logits, KVCache(WIDE["n_layers"])
        steps = torch.cat([network(step, past_key_values=cache).logits for step in ids.split(1, dim=1)], dim=1)
    for logits, bound in ((read, MANY_ROWS), (steps, FEW_ROWS)):
        assert (logits - wanted).norm() <= bound * wanted.norm()


def test_float32_when_asked_is_exact(tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.gguf", "Q4_1", SMALL)
    with torch.inference_mode():
        exact = DbrxForCausalLM.from_pretrained(path, dtype="float32")
        wanted = exact(PROMPT).logits
        found = DbrxForCausalLM.from_pretrained(path, dtype="float32", pack=True)(PROMPT).logits
    assert (found - wanted).norm() <= 2e-6 * wanted.norm()


def test_streamed_experts_are_computed_with_as_they_arrive(tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.gguf", "Q4_K")
    held = DbrxForCausalLM.from_pretrained(path, pack=True)
    streamed = DbrxForCausalLM.from_pretrained(path, pack=True, offload="disk", expert_cache=2**20)
    assert streamed.load_plan is not None and streamed.load_plan.streamed == 2 and streamed.load_plan.as_stored
    with torch.inference_mode():
        for n, bound in ((21, 1e-3), (1, 1e-4)):  # of 21 rows an expert gets few at a time, and many
            found, wanted = streamed(PROMPT[:, :n]).logits, held(PROMPT[:, :n]).logits
            assert (found - wanted).norm() <= bound * wanted.norm()


def test_a_plan_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.gguf", "Q4_K")
    with open_weights(path) as weights:
        plan = plan_here(weights, LoadOptions(pack=True, quantize="auto"))
        assert sum(weights.dtypes().values()) == pytest.approx(plan.sizes.total, abs=64)
    network = DbrxForCausalLM.from_pretrained(path, pack=True)
    assert bytes_per_token(network, context=0) == pytest.approx(plan.sizes.active, rel=0.01)
    assert plan.scheme == GGUF and not plan.converts and plan.mapped and not plan.notices


@pytest.mark.parametrize(
    ("options", "scheme", "form"),
    [
        ({"dtype": "float32"}, "none", "float32"),  # who names a type wants its numbers
        ({"quantize": "int8"}, "int8", "int8"),
        ({"pack": False}, "none", "bfloat16"),  # parameters, as the library gives them
    ],
)
def test_other_forms_when_asked(tmp_path: Path, options: dict[str, Any], scheme: str, form: str) -> None:
    with open_weights(write_gguf(tmp_path / "m.gguf", "q8_0")) as weights:
        plan = plan_here(weights, LoadOptions(**{"pack": True, **options}))
    assert (plan.scheme, plan.format) == (scheme, form)


def test_types_without_a_kernel_become_floats(tmp_path: Path) -> None:
    with open_weights(write_gguf(tmp_path / "m.gguf", "q8_0", others={"ffn_down_exps.weight": "mxfp4"})) as weights:
        plan = plan_here(weights, LoadOptions(pack=True))
    assert plan.scheme == "none" and "which become bfloat16" in plan.notices[0]
