"""Weights that MLX, GPTQ and AWQ packed and that are computed with as they are: against MLX's numbers, and float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dbrx_cli.bench import bytes_per_token
from model import native
from model.causal_lm import DbrxForCausalLM
from model.errors import ModelError
from model.formats import open_weights
from model.formats.awq import Awq
from model.formats.gptq import Gptq
from model.kernels.native_kept import KeptEmbedding, NativeKept
from model.load_plan import LoadOptions
from model.loading import plan_here
from model.quantization import GROUP_BITS, MLX, groups
from model.weights import GroupMatrix
from tests.test_layouts import (
    CONFIG,
    Tensors,
    pack_words,
    quantize_gptq,
    quantize_mlx,
    split_experts,
    split_qkv,
    weights,
    write,
)

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels")

GOLDEN = load_file(Path(__file__).parent / "data" / "mlx_golden.safetensors")
PACKED = load_file(Path(__file__).parent / "data" / "packed_golden.safetensors")
RANGES = (torch.bfloat16, torch.float16, torch.float32)
PROMPT = torch.randint(0, 96, (1, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", sorted({name.rpartition(".")[0] for name in GOLDEN}))
def test_weights_are_mlx_s_to_the_bit(form: str) -> None:
    dtype, bits, group = form.split(".")
    words, scales, biases, meant = (GOLDEN[f"{form}.{part}"] for part in ("weight", "scales", "biases", "meant"))
    ranges = (part.to(getattr(torch, dtype)) for part in (scales, biases))
    stored = GroupMatrix(words.view(torch.uint8), *ranges, int(bits), int(group))
    for found in (groups.dequantize(stored), KeptEmbedding(stored)(torch.arange(len(words)))):
        assert torch.equal(found.view(torch.int32), meant.view(torch.int32))


@pytest.mark.parametrize("form", sorted({name.rpartition(".")[0] for name in PACKED}))
def test_what_autoround_packed_is_what_it_computes_with(form: str) -> None:
    """Unpacked to floats, and kept in its bits; AutoRound's floats have 16 bits."""
    encoding = Awq() if form.startswith("awq") else Gptq({"desc_act": False, "group_size": 32})
    parts, meant = [PACKED[f"{form}.{part}"] for part in encoding.parts], PACKED[f"{form}.meant"]
    types = [{torch.int32: "I32", torch.float16: "F16"}[part.dtype] for part in parts]
    shapes, wanted = [tuple(part.shape) for part in parts], (len(meant), meant.shape[1])
    kept = encoding.groups(types, shapes, wanted)
    assert encoding.check(types, shapes, wanted) is None and kept is not None
    for found in (encoding.unpack(parts, wanted), groups.dequantize(encoding.keep(parts, kept))):
        assert torch.equal(found.half(), meant)


def random_matrix(bits: int, group: int, outputs: int, inputs: int, dtype: torch.dtype, zeros: bool) -> GroupMatrix:
    """Any levels; scales with either sign."""
    generator = torch.Generator().manual_seed(bits * group)
    values = torch.randint(0, 256, (outputs, inputs * bits // 8), dtype=torch.uint8, generator=generator)
    count = -(-inputs // group)
    scale = torch.randn(outputs, count, generator=generator).to(dtype)
    middle = torch.full((outputs, count), 2.0 ** (bits - 1))
    offset = middle if zeros else -middle * scale.float()
    return GroupMatrix(
        values, scale, (offset + torch.randn(middle.shape, generator=generator)).to(dtype), bits, group, zeros
    )


def meant_by(stored: GroupMatrix) -> Tensor:
    """In float64, level by level from the bits."""
    apart = np.unpackbits(stored.values.numpy(), axis=1, bitorder="little")
    levels = torch.from_numpy(apart.reshape(len(apart), -1, stored.bits) @ 2.0 ** np.arange(stored.bits))
    scale, offset = (
        part.double().repeat_interleave(stored.group, 1)[:, : levels.shape[1]] for part in (stored.scale, stored.offset)
    )
    return (levels - offset) * scale if stored.zero_points else levels * scale + offset


@pytest.mark.parametrize("bits", GROUP_BITS)
def test_products_of_few_and_many_rows(bits: int) -> None:
    kernel = NativeKept(MLX)
    # Whole spans of 256 inputs and not, a group that ends early, more scales than a span has.
    for group, inputs, dtype in zip((32, 64, 128), (1000, 512, 328), RANGES, strict=True):
        for zeros in (False, True):
            stored = random_matrix(bits, group, 37, inputs, dtype, zeros)
            exact = meant_by(stored)
            for n, bound in ((1, 5e-5), (7, 5e-5), (40, 2e-4)):
                x = torch.randn(n, inputs, generator=torch.Generator().manual_seed(n))
                out = kernel.run(kernel.prepare(x), kernel.load(stored))
                wanted = x.double() @ exact.t()
                assert (out - wanted).norm() <= bound * wanted.norm(), (group, zeros, n)


# ---- networks


def pack(tensors: Tensors, encode: Callable[[str, Tensor], Tensors], only: tuple[str, ...]) -> Tensors:
    """What is stored where the matrices with one of these names are packed."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        found |= encode(module, tensor) if any(part in name for part in only) else {name: tensor.bfloat16()}
    return found


def of_mlx(folder: Path, bits: int = 4, group: int = 64, odd: dict[str, tuple[int, int]] | None = None) -> Path:
    """All that mlx_lm.convert packs; odd: bits and groups of modules that have others."""

    def encode(name: str, weight: Tensor) -> Tensors:
        form = next((each for part, each in (odd or {}).items() if part in name), (bits, group))
        return quantize_mlx(name, weight, *form)[0]

    packed = "experts", "attn.Wqkv", "out_proj", "router", "wte", "lm_head"
    stored = pack(split_experts(weights(), "ffn.experts.{e}.{m}"), encode, packed)
    return write(folder, stored, {**CONFIG, "quantization": {"group_size": group, "bits": bits}})


def of_gptq(folder: Path, bits: int = 4, in_order: bool = True, size: int = 32) -> Path:
    layout = split_qkv(split_experts(weights(), "ffn.experts.mlp.{e}.{m}"))
    stored = pack(layout, lambda *each: quantize_gptq(*each, bits, size, True, in_order)[0], ("experts", "_proj"))
    settings = {"quant_method": "gptq", "bits": bits, "desc_act": False, "group_size": size}
    return write(folder, stored, {**CONFIG, "quantization_config": settings})


def quantize_awq(name: str, weight: Tensor) -> Tensors:
    """Groups of 32; eight outputs in a word, those with even numbers in the lower half."""
    grouped = weight.t().unflatten(0, (-1, 32))
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (grouped / scales.float() + zeros).round().clamp(0, 15).flatten(0, 1)

    def words(numbers: Tensor) -> Tensor:
        order = numbers.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)
        return pack_words(order.numpy().astype(np.uint32), 4).view(torch.int32)

    return {f"{name}.qweight": words(codes), f"{name}.qzeros": words(zeros[:, 0]), f"{name}.scales": scales[:, 0]}


def of_awq(folder: Path) -> Path:
    layout = split_qkv(split_experts(weights(), "ffn.experts.mlp.{e}.{m}"))
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    stored = pack(layout, quantize_awq, ("experts", "_proj"))
    return write(folder, stored, {**CONFIG, "quantization_config": settings})


MADE: dict[str, Callable[[Path], Path]] = {
    "mlx-4bit-g64": of_mlx,
    # As mixes have them: dense matrices in more bits than experts, some that no kernel computes with.
    "mlx-3bit-g32": lambda path: of_mlx(path, 3, 32, {"w2": (6, 64), "lm_head": (8, 64), "out_proj": (4, 16)}),
    "gptq-4bit-g32": of_gptq,
    "gptq-8bit-g64": lambda path: of_gptq(path, 8, size=64),
    "awq-4bit-g32": of_awq,
}


@pytest.mark.parametrize("form", MADE)
def test_a_network_gives_the_logits_and_tokens_of_its_values(tmp_path: Path, form: str) -> None:
    folder = MADE[form](tmp_path / "m")
    exact = DbrxForCausalLM.from_pretrained(folder, dtype="float32")
    packed = DbrxForCausalLM.from_pretrained(folder, dtype="float32", pack=True)
    network = DbrxForCausalLM.from_pretrained(folder, quantize="none", pack=True)
    assert network.load_plan is not None and network.kernels is not None
    assert (network.load_plan.scheme, network.load_plan.format) == (form.partition("-")[0], form)
    assert network.kernels.name == f"{network.load_plan.scheme} native"
    with torch.inference_mode():
        wanted, found = exact(PROMPT).logits, network(PROMPT).logits
        assert (packed(PROMPT).logits - wanted).norm() <= 1e-5 * wanted.norm()
        assert (found - wanted).norm() <= 1e-3 * wanted.norm()
        greedy = [each.generate(PROMPT, max_new_tokens=24, do_sample=False) for each in (exact, network)]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("form", ["mlx-4bit-g64", "awq-4bit-g32"])
def test_streamed_experts_stay_in_their_form(tmp_path: Path, form: str) -> None:
    folder = MADE[form](tmp_path / "m")
    held = DbrxForCausalLM.from_pretrained(folder, pack=True)
    streamed = DbrxForCausalLM.from_pretrained(folder, pack=True, offload="disk", expert_cache=2**19)
    assert streamed.load_plan is not None and streamed.load_plan.streamed == 2
    assert (streamed.load_plan.scheme, streamed.load_plan.format) == (form.partition("-")[0], form)
    with torch.inference_mode():
        for n, bound in ((21, 1e-3), (1, 1e-4)):  # of 21 rows an expert gets few at a time, and many
            found, wanted = streamed(PROMPT[:, :n]).logits, held(PROMPT[:, :n]).logits
            assert (found - wanted).norm() <= bound * wanted.norm()


def test_a_plan_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    folder = of_mlx(tmp_path / "m")
    with open_weights(folder) as opened:
        plan = plan_here(opened, LoadOptions(pack=True, quantize="auto"))
        matrices = (name for name, weight in weights().items() if weight.dim() == 2 and ".router." not in name)
        kept = sum(map(opened.nbytes_of, matrices))
    assert plan.scheme == MLX and plan.mapped and not plan.converts and not plan.notices
    network = DbrxForCausalLM.from_pretrained(folder, pack=True)
    held = plan.sizes.total - 4 * (2 * 3 * 64 + 5 * 64)  # routers and norms are floats
    assert held == pytest.approx(kept, abs=64)
    assert bytes_per_token(network, context=0) == pytest.approx(plan.sizes.active, rel=0.02)


def test_what_has_no_kernel_becomes_floats(tmp_path: Path) -> None:
    forms: dict[str, tuple[Path, dict[str, Any]]] = {
        "none": (of_mlx(tmp_path / "a"), {"dtype": "float32"}),  # who names a type wants its numbers
        "int8": (tmp_path / "a", {"quantize": "int8"}),
    }
    for scheme, (folder, options) in forms.items():
        with open_weights(folder) as opened:
            assert plan_here(opened, LoadOptions(**{"pack": True, **options})).scheme == scheme
    odd = of_mlx(tmp_path / "b", odd={"experts.1.w2": (4, 16)})
    with open_weights(odd) as opened:
        plan = plan_here(opened, LoadOptions(pack=True))
    assert plan.scheme == "none" and "which become bfloat16" in plan.notices[0]


def test_gptq_in_another_order_than_it_says(tmp_path: Path) -> None:
    folder = of_gptq(tmp_path / "m", in_order=False)
    with pytest.raises(ModelError, match=r"in another order .* desc_act is false"):
        DbrxForCausalLM.from_pretrained(folder, pack=True)
