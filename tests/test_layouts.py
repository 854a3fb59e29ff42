"""Checkpoints in the layouts of other programs: the logits of the same weights in Databricks' layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model import DbrxConfig, DbrxForCausalLM
from model.errors import ModelError
from model.formats import open_weights
from tests.cli import Cli
from tests.weights import make_checkpoint, make_weights, write_small_tokenizer

torch.set_num_threads(1)

# Every dimension differs; rows are multiples of MLX's and GPTQ's groups.
CONFIG: dict[str, Any] = {
    "model_type": "dbrx", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 3, "moe_top_k": 2},
}  # fmt: skip
IDS = torch.tensor([[5, 17, 2, 3, 90, 42, 9]])
Tensors = dict[str, Tensor]
STACK = ".ffn.experts.mlp."


def weights() -> Tensors:
    return {name: torch.from_numpy(value) for name, value in make_weights(CONFIG, 5).items()}


def split_experts(tensors: Tensors, template: str, linear: bool = True) -> Tensors:
    """A module for each expert, named by the template; a linear layer holds w2 transposed."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        block, stack, matrix = name.partition(STACK)
        if not stack:
            found[name] = tensor
            continue
        for e, part in enumerate(tensor.chunk(3)):
            part = part.t() if linear and matrix == "w2" else part
            found[f"{block}.{template.format(e=e, m=matrix)}.weight"] = part.contiguous()
    return found


def split_qkv(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        if "Wqkv" not in name:
            found[name] = tensor
            continue
        for letter, rows in zip("qkv", (tensor[:64], tensor[64:96], tensor[96:]), strict=True):
            found[name.replace("Wqkv", f"{letter}_proj")] = rows.clone()
    return found


def write(folder: Path, tensors: Tensors, config: dict[str, Any] = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def logits(source: Path | Tensors, **options: Any) -> Tensor:
    """Of a folder, or of tensors under Databricks' names; the weights in memory of the process."""
    if isinstance(source, Path):
        network = DbrxForCausalLM.from_pretrained(source, **options)
        source = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    else:
        network = DbrxForCausalLM(DbrxConfig.from_dict(CONFIG)).eval()
    network.load_state_dict(source, assign=True)
    return torch.as_tensor(network(IDS).logits)


FLOAT_LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "converted": lambda t: split_qkv(split_experts(t, "ffn.experts.mlp.{e}.{m}")),
    "fixed": lambda t: split_experts(t, "ffn.experts.mlp_experts.{e}.{m}"),
    "nested": lambda t: split_experts(t, "ffn.experts.mlp.experts.{e}.{m}"),
    "mlx": lambda t: split_experts(t, "ffn.experts.{e}.{m}"),
    "untransposed": lambda t: split_experts(t, "ffn.experts.mlp.experts.{e}.{m}", linear=False),
    "qkv": split_qkv,
}


@pytest.mark.parametrize("layout", FLOAT_LAYOUTS)
def test_floats_give_the_same_logits(tmp_path: Path, layout: str) -> None:
    folder = write(tmp_path / layout, FLOAT_LAYOUTS[layout](weights()))
    assert torch.equal(logits(folder), logits(weights()))
    check_experts(folder, weights())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_floats_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in FLOAT_LAYOUTS["converted"](weights()).items()}
    network = DbrxForCausalLM.from_pretrained(write(tmp_path / "m", tensors))
    assert network.dtype == dtype
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights()[name].to(dtype)), name


def test_float16_in_databricks_layout(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, CONFIG, 5, dtype="float16")
    assert DbrxForCausalLM.from_pretrained(folder).dtype == torch.float16


def check_experts(folder: Path, expected: Tensors) -> None:
    """Each expert, from the map and from its extents, is that of the stacks."""
    with open_weights(folder) as opened:
        for layer in range(2):
            for e in range(3):
                extents = opened.expert_extents(layer, e)
                data = tuple(
                    torch.frombuffer(bytearray(each.file.read_bytes()[each.start :][: each.nbytes]), dtype=torch.uint8)
                    for each in extents
                )
                wanted = [expected[f"transformer.blocks.{layer}{STACK}{m}"].chunk(3)[e] for m in ("w1", "v1", "w2")]
                alone = [opened.expert_matrix(layer, e, matrix) for matrix in range(3)]
                for found in (opened.expert(layer, e), opened.expert(layer, e, data), alone):
                    for ours, theirs in zip(found, wanted, strict=True):
                        assert torch.equal(ours, theirs) and ours.is_contiguous()


def pack_words(codes: np.ndarray[Any, Any], bits: int) -> Tensor:
    """[n, m] small numbers -> [n, m * bits / 32] words, bit by bit, lowest bits first."""
    apart = (codes.astype(np.uint32)[..., None] >> np.arange(bits, dtype=np.uint32) & 1).astype(np.uint8)
    return torch.from_numpy(np.packbits(apart.reshape(len(codes), -1), axis=1, bitorder="little").view(np.uint32))


def quantize_mlx(name: str, weight: Tensor, bits: int, group: int) -> tuple[Tensors, Tensor]:
    """Stored tensors and the values that they stand for."""
    grouped = weight.view(len(weight), -1, group)
    low, high = grouped.amin(-1).half().float(), grouped.amax(-1)
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-4).half().float()
    codes = ((grouped - low[..., None]) / scales[..., None]).round().clamp(0, 2**bits - 1)
    values = codes * scales[..., None] + low[..., None]
    stored = pack_words(codes.view(weight.shape).numpy().astype(np.uint32), bits)
    return (
        {f"{name}.weight": stored, f"{name}.scales": scales.half(), f"{name}.biases": low.half()},
        values.view(weight.shape),
    )


def quantize_gptq(
    name: str, weight: Tensor, bits: int, group: int, lowered: bool, in_order: bool = False
) -> tuple[Tensors, Tensor]:
    """The same; inputs are dealt to groups in turn, as after sorting by importance (desc_act), or are in order."""
    out, inputs = weight.shape
    index = torch.arange(inputs) // group if in_order else torch.arange(inputs) % (inputs // group)
    scales = torch.stack([weight[:, index == g].abs().amax(1) for g in range(inputs // group)]) / 2 ** (bits - 1)
    scales = scales.half().float()
    zeros = torch.arange(out) % 3 + 2 ** (bits - 1) - 1
    codes = (weight / scales.t()[:, index] + zeros[:, None]).round().clamp(0, 2**bits - 1)
    values = (codes - zeros[:, None]) * scales.t()[:, index]
    stored_zeros = (zeros - int(lowered)).expand(inputs // group, out).numpy().astype(np.uint32)
    return {
        f"{name}.qweight": pack_words(codes.numpy().astype(np.uint32), bits).view(torch.int32).t(),
        f"{name}.qzeros": pack_words(stored_zeros, bits).view(torch.int32),
        f"{name}.scales": scales.half(),
        f"{name}.g_idx": index.int(),
    }, values


def quantized(tensors: Tensors, quantize: Callable[[str, Tensor], tuple[Tensors, Tensor]]) -> tuple[Tensors, Tensors]:
    """What is stored of weights in an unfused layout, and the values by the same names."""
    stored, values = {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() == 1 or "router" in name or "wte" in name or "lm_head" in name:
            stored[name] = values[name] = tensor
            continue
        parts, value = quantize(name.removesuffix(".weight"), tensor)
        stored |= parts
        values[name] = value
    return stored, values


def fused(tensors: Tensors, template: str) -> Tensors:
    """Back to Databricks' layout, by the names."""
    found: Tensors = {}
    for name in weights():
        block, stack, matrix = name.partition(STACK)
        if stack:
            parts = [tensors[f"{block}.{template.format(e=e, m=matrix)}.weight"] for e in range(3)]
            found[name] = torch.cat([part.t() if matrix == "w2" else part for part in parts])
        elif "Wqkv" in name and name not in tensors:
            found[name] = torch.cat([tensors[name.replace("Wqkv", f"{letter}_proj")] for letter in "qkv"])
        else:
            found[name] = tensors[name]
    return found


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 32), (8, 64), (2, 64)])
def test_mlx_gives_the_logits_of_its_values(tmp_path: Path, bits: int, group: int) -> None:
    template = "ffn.experts.{e}.{m}"
    layout = split_experts(weights(), template)
    stored, values = quantized(layout, lambda name, weight: quantize_mlx(name, weight, bits, group))
    folder = write(tmp_path / "m", stored, {**CONFIG, "quantization": {"group_size": group, "bits": bits}})
    expected = fused(values, template)
    assert torch.equal(logits(folder, dtype="float32"), logits(expected))
    assert DbrxForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    check_experts(folder, expected)


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_gives_the_logits_of_its_values(tmp_path: Path, fmt: str | None, bits: int) -> None:
    template = "ffn.experts.mlp.{e}.{m}"
    layout = split_qkv(split_experts(weights(), template))
    stored, values = quantized(layout, lambda name, w: quantize_gptq(name, w, bits, 32, lowered=fmt != "gptq_v2"))
    settings = {"quant_method": "gptq", "bits": bits, **({} if fmt is None else {"checkpoint_format": fmt})}
    folder = write(tmp_path / "m", stored, CONFIG if fmt is None else {**CONFIG, "quantization_config": settings})
    if fmt is None:
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    expected = fused(values, template)
    assert torch.equal(logits(folder, dtype="float32"), logits(expected))
    check_experts(folder, expected)


def mlx(change: Callable[[Tensors], object]) -> Callable[[], Tensors]:
    def make() -> Tensors:
        layout = split_experts(weights(), "ffn.experts.{e}.{m}")
        stored, _ = quantized(layout, lambda name, weight: quantize_mlx(name, weight, 4, 32))
        change(stored)
        return stored

    return make


def gptq(change: Callable[[Tensors], object]) -> Callable[[], Tensors]:
    def make() -> Tensors:
        layout = split_experts(weights(), "ffn.experts.mlp.{e}.{m}")
        stored, _ = quantized(layout, lambda name, weight: quantize_gptq(name, weight, 4, 32, True))
        change(stored)
        return stored

    return make


def unfused(change: Callable[[Tensors], object]) -> Callable[[], Tensors]:
    def make() -> Tensors:
        stored = split_experts(weights(), "ffn.experts.mlp.{e}.{m}")
        change(stored)
        return stored

    return make


B = "transformer.blocks.1."
MLX, GPTQ = f"{B}ffn.experts.2.v1", f"{B}ffn.experts.mlp.2.v1"
DEFECTS: dict[str, tuple[Callable[[], Tensors], str]] = {
    "expert_missing": (unfused(lambda t: t.pop(f"{GPTQ}.weight")), rf"1 tensor \({GPTQ}.weight\) is missing"),
    "expert_too_many": (unfused(lambda t: t.update({f"{B}ffn.experts.mlp.3.w1.weight": torch.ones(2)})), "not belong"),
    "expert_shape": (unfused(lambda t: t.update({f"{GPTQ}.weight": torch.ones(64, 128)})), r"has shape \[64, 128\]"),
    "expert_type": (unfused(lambda t: t.update({f"{GPTQ}.weight": torch.ones(128, 64).char()})), "no float type"),
    "w2_of_another_orientation": (
        unfused(lambda t: t.update({f"{GPTQ[:-2]}w2.weight": torch.ones(128, 64)})),
        "has shape",
    ),
    "mlx_no_biases": (mlx(lambda t: t.pop(f"{MLX}.biases")), rf"1 tensor \({MLX}.biases\) is missing"),
    "mlx_other_mode": (mlx(lambda t: t.update({f"{MLX}.scales": torch.ones(128, 2).byte()})), "way of MLX"),
    "mlx_bits": (mlx(lambda t: t.update({f"{MLX}.weight": torch.ones(128, 14).view(torch.uint32)})), "2 to 6 or 8"),
    "mlx_groups": (
        mlx(lambda t: t.update({f"{MLX}.{part}": torch.ones(128, 3) for part in ("scales", "biases")})),
        "odd groups",
    ),
    "gptq_bits": (gptq(lambda t: t.update({f"{GPTQ}.qweight": torch.ones(10, 128).int()})), "2, 3, 4 or 8 bits"),
    "gptq_zeros": (gptq(lambda t: t.update({f"{GPTQ}.qzeros": torch.ones(2, 8).int()})), "unlike GPTQ's"),
    "gptq_index": (gptq(lambda t: t.update({f"{GPTQ}.g_idx": torch.full((64,), 9)})), "groups that are not there"),
    "gptq_index_below": (gptq(lambda t: t.update({f"{GPTQ}.g_idx": torch.arange(64) % 2 - 1})), "that are not there"),
    "awq": (gptq(lambda t: [t.pop(name) for name in list(t) if "g_idx" in name]), "GPTQ or AWQ, and nothing"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_damaged_layouts_are_refused_by_name(tmp_path: Path, defect: str) -> None:
    make, message = DEFECTS[defect]
    folder = write(tmp_path / "m", make())
    with pytest.raises(ModelError, match=message) as error, open_weights(folder) as opened:
        opened.expert(1, 2)
    assert error.value.message.startswith(f"{folder}/")


def test_another_config_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", FLOAT_LAYOUTS["converted"](weights()), {**CONFIG, "n_layers": 2000})
    with pytest.raises(ModelError, match="too few for 2000 layers"):
        open_weights(folder)


def test_a_layout_converts_to_databricks(tmp_path: Path, cli: Cli) -> None:
    folder = write(tmp_path / "m", FLOAT_LAYOUTS["converted"](weights()))
    write_small_tokenizer(folder)
    assert cli("convert", folder, tmp_path / "out").code == 0
    assert torch.equal(logits(tmp_path / "out"), logits(weights()))
