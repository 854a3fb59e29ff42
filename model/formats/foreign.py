"""Folders whose weights another program quantized: named by what their settings say, with a way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError
from ..model_files import ModelFiles
from ..quantization import GROUP_BITS
from ..safetensors_file import read_json, shown

COMPRESSED = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")  # if symmetric
READABLE_BITS = {"gptq": (2, 3, 4, 8), "mlx": GROUP_BITS}
# Where programs say how they quantized: a file, its key if it is a part of it, and the method where none is named.
PLACES = (
    ("config.json", "quantization_config", ""),
    ("config.json", "compression_config", "compressed-tensors"),  # until 2024
    ("config.json", "quantization", "mlx"),
    ("quantize_config.json", None, "gptq"),
    ("quant_config.json", None, "awq"),
)
FROM_SOURCE = "give the checkpoint that it was made from, with --quantize int4 for few bits; or a GGUF file of it"
GPTQ_WAY = "take GPTQ of 2, 3, 4 or 8 bits in its own format (gptq or gptq_v2), or the checkpoint that it was made from"
AWQ_WAY = "take AWQ of 4 bits (gemm), or the checkpoint that it was made from"
MLX_WAY = "take MLX of 2 to 6 or 8 bits (affine), or make floats of it: mlx_lm.convert --dequantize"


def quantization_of(files: ModelFiles) -> dict[str, Any]:
    """What a checkpoint says about its quantization, under `quant_method` by which program; empty if nothing."""
    for file, key, method in PLACES:
        try:
            path = files.path / file
            found = files.settings if file == "config.json" else read_json(path) if path.is_file() else {}
        except ModelError:
            continue
        settings = found if key is None else found.get(key)
        if isinstance(settings, dict) and settings:
            if key == "quantization_config" and "quant_method" not in settings:
                method = "mlx" if "group_size" in settings else method  # mlx-lm writes its settings there, too
            return {"quant_method": method, **settings}
    return {}


def refusal(files: ModelFiles) -> ModelError | None:
    """The fault that names a quantization which is not read; None if the settings name no such."""
    settings = quantization_of(files)
    method = str(settings.get("quant_method", "")).lower()
    if not method or method == "dbrx":
        return None
    way = {"gptq": GPTQ_WAY, "mlx": MLX_WAY, "awq": AWQ_WAY}.get(method, FROM_SOURCE)
    detail = _detail(method, settings)
    if method in ("gptq", "mlx", "awq", "compressed-tensors") and detail is None:
        return None
    program = {"mlx": "MLX", "gptq": "GPTQ", "awq": "AWQ"}.get(method, shown(method))
    what = f"weights quantized by {program}" + (f" ({shown(detail)})" if detail else "")
    return ModelError(f"{files.path}: holds {what}, which cannot be read", way)


def _detail(method: str, settings: Mapping[str, Any]) -> str | None:
    """The variety; of GPTQ, AWQ, MLX and compressed-tensors what makes it another than those that are read."""
    bits = [settings.get("bits"), *(part.get("bits") for part in settings.values() if isinstance(part, dict))]
    if method == "gptq":
        marlin = "marlin" if settings.get("is_marlin_format") else None
        layout = settings.get("checkpoint_format") or settings.get("format") or marlin or "gptq"
        if layout not in ("gptq", "gptq_v2") or marlin:
            return f"format {marlin or layout}"
    if method == "awq":
        version, bits_of = settings.get("version", "gemm"), settings.get("bits", settings.get("w_bit", 4))
        return None if str(version).lower() == "gemm" and bits_of == 4 else f"{bits_of} bits, {version}"
    if method == "mlx" and settings.get("mode", "affine") != "affine":
        return str(settings["mode"])
    if method in READABLE_BITS:
        odd = [each for each in bits if each is not None and each not in READABLE_BITS[method]]
        return f"{odd[0]} bits" if odd else None
    if method == "compressed-tensors" and settings.get("format") in COMPRESSED:
        return _odd_group(settings)
    if method == "bitsandbytes":
        return str(settings.get("bnb_4bit_quant_type", "fp4")) if settings.get("load_in_4bit") else "int8"
    for key in ("format", "packing_format", "weights", "quant_algo"):
        if isinstance(settings.get(key), str):
            return str(settings[key])
    return f"{bits[0]} bits" if bits[0] is not None else None


def _odd_group(settings: Mapping[str, Any]) -> str | None:
    """What makes one of compressed-tensors' groups of modules another than those that are read."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            if weights.get("symmetric") is False or weights.get("actorder") == "group":
                return f"{settings['format']}, {'asymmetric' if weights.get('symmetric') is False else 'act-order'}"
            if settings["format"] == "pack-quantized" and weights.get("num_bits") not in (None, 2, 4, 8):
                return f"{settings['format']}, {weights['num_bits']} bits"
    return None
