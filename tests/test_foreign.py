"""What other programs quantize and keep: named for what it is, with a way out; GGUF files opened where they lie."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model import AutoTokenizer, DbrxForCausalLM
from model.checkpoint import FITS
from model.errors import ModelError
from model.formats import open_weights
from model.formats.ollama import is_chatml, manifest_of
from model.generation_config import GenerationConfig
from model.hub import inventory, resolve
from model.messages import Message
from model.model_files import ModelFiles
from model.quantization import groups
from model.sampling import SamplingParams
from tests.cli import Cli
from tests.gguf_files import SPECIAL, write_gguf
from tests.test_layouts import CONFIG, Tensors, quantize_gptq, quantized, split_experts, split_qkv, weights, write

APART = "ffn.experts.mlp.{e}.{m}"
Parts = Callable[[str, Tensor], Tensors]


def packed(tensors: Tensors, parts: Parts) -> Tensors:
    """Each matrix of attention and experts in another program's parts; the rest as it is."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        linear = tensor.dim() == 2 and not any(part in name for part in ("wte", "lm_head", "router"))
        found |= parts(name.removesuffix(".weight"), tensor) if linear else {name: tensor}
    return found


def apart() -> Tensors:
    return split_qkv(split_experts(weights(), APART))


def words(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def eight(name: str, w: Tensor) -> Tensors:
    return {f"{name}.weight": w.to(torch.int8), f"{name}.SCB": w[:, 0], f"{name}.weight_format": torch.ones(1).byte()}


def fp8(name: str, w: Tensor) -> Tensors:
    return {f"{name}.weight": w.to(torch.float8_e4m3fn), f"{name}.weight_scale": torch.zeros(len(w), 2).byte()}


def nf4(name: str, w: Tensor) -> Tensors:
    return {
        f"{name}.weight": torch.zeros(w.numel() // 2, 1).byte(),
        f"{name}.weight.absmax": torch.zeros(w.numel() // 64).byte(),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.zeros(70).byte(),
    }


def w4a16(name: str, w: Tensor) -> Tensors:
    scale, shape = w[:, :1].bfloat16(), torch.tensor(w.shape)
    return {
        f"{name}.weight_packed": words(len(w), w.shape[1] // 8),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": shape,
        f"{name}.weight_zero_point": words(len(w) // 8, 1),
    }


def five_bits(name: str, w: Tensor) -> Tensors:
    groups, out, inputs = 2, len(w), w.shape[1]
    return {
        f"{name}.qweight": words(inputs * 5 // 32, out), f"{name}.qzeros": words(groups, out * 5 // 32),
        f"{name}.scales": torch.ones(groups, out).half(), f"{name}.g_idx": words(inputs),
    }  # fmt: skip


def mlx(bits: int, biases: bool = True) -> Parts:
    def parts(name: str, w: Tensor) -> Tensors:
        scales = torch.ones(len(w), w.shape[1] // 32)
        found = {
            f"{name}.weight": torch.zeros(len(w), w.shape[1] * bits // 32, dtype=torch.uint32),
            f"{name}.scales": scales if biases else scales.byte(),
        }
        return found | ({f"{name}.biases": scales.clone()} if biases else {})

    return parts


def named(*endings: str) -> Parts:
    return lambda name, w: {f"{name}{ending}": torch.zeros(4) for ending in endings}


def native(parts: Parts) -> Tensors:
    """Databricks' layout, with attention packed and the stacks left, as tools leave a native checkpoint."""
    return packed({n: t for n, t in weights().items() if ".experts." not in n}, parts) | {
        n: t for n, t in weights().items() if ".experts." in n
    }


Q = "quantization_config"
ASYMMETRIC = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": False}}}
FOREIGN: dict[str, tuple[dict[str, Any], Callable[[], Tensors], str]] = {
    "nf4": ({Q: {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
            lambda: native(nf4), r"bitsandbytes \(nf4\)"),
    "bnb_int8": ({Q: {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}},
                 lambda: native(eight), r"bitsandbytes \(int8\)"),
    "w4a16": ({Q: {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": ASYMMETRIC}},
              lambda: packed(apart(), w4a16), r"compressed-tensors \(pack-quantized, asymmetric\)"),
    "w4a16_native": ({"compression_config": {"format": "pack-quantized", "config_groups": ASYMMETRIC}},
                     lambda: native(w4a16), r"compressed-tensors \(pack-quantized, asymmetric\)"),
    "mxfp8": ({Q: {"quant_method": "compressed-tensors", "format": "mxfp8-quantized"}},
              lambda: packed(apart(), fp8), r"compressed-tensors \(mxfp8-quantized\)"),
    "nvfp4": ({Q: {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
              lambda: packed(apart(), named(".weight_packed", ".weight_global_scale")), "nvfp4-pack-quantized"),
    "fp8": ({Q: {"quant_method": "fp8", "weight_block_size": [128, 128]}}, lambda: native(fp8), "quantized by fp8"),
    "quanto": ({Q: {"quant_method": "quanto", "weights": "int8"}},
               lambda: native(named(".weight._data", ".weight._scale")), r"quanto \(int8\)"),
    "torchao": ({Q: {"quant_method": "torchao"}}, lambda: native(named("._weight_qdata", "._weight_scale")), "torchao"),
    "hqq": ({Q: {"quant_method": "hqq", "bits": 4}}, lambda: native(named(".W_q", ".scale", ".zero")), r"hqq \(4 bits"),
    "awq": ({Q: {"quant_method": "awq", "bits": 4, "version": "gemv"}},
            lambda: packed(apart(), named(".qweight", ".qzeros", ".scales")), r"AWQ \(4 bits, gemv\)"),
    "marlin": ({Q: {"quant_method": "gptq", "bits": 4, "is_marlin_format": True}},
               lambda: packed(apart(), named(".B", ".s")), r"GPTQ \(format marlin\)"),
    "gptq_5": ({Q: {"quant_method": "gptq", "bits": 5, "checkpoint_format": "gptq"}},
               lambda: packed(apart(), five_bits), r"GPTQ \(5 bits\)"),
    "gptq_p": ({Q: {"quant_method": "gptq", "bits": 5, "format": "gptq_p", "checkpoint_format": "gptq_p"}},
               lambda: packed(apart(), named(".qweight", ".qzeros", ".scales", ".g_idx")), r"GPTQ \(format gptq_p\)"),
    "auto_round": ({Q: {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}},
                   lambda: packed(apart(), named(".qweight", ".qzeros", ".scales")), r"auto-round \(auto_round:auto_g"),
    "quark": ({Q: {"quant_method": "quark"}}, lambda: native(fp8), "quark"),
    "exl3": ({Q: {"quant_method": "exl3", "bits": 4.0}},
             lambda: packed(apart(), named(".trellis", ".suh", ".svh")), r"exl3 \(4.0 bits\)"),
    "mxfp4": ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
              lambda: packed(split_experts(weights(), "ffn.experts.{e}.{m}"), mlx(4, False)), r"MLX \(mxfp4\)"),
    "nvfp4_mlx": ({Q: {"group_size": 16, "bits": 4, "mode": "nvfp4"}},
                  lambda: packed(split_experts(weights(), "ffn.experts.{e}.{m}"), mlx(4, False)), r"MLX \(nvfp4\)"),
    "mlx_7": ({"quantization": {"group_size": 32, "bits": 7}},
              lambda: packed(split_experts(weights(), "ffn.experts.{e}.{m}"), mlx(7)), r"MLX \(7 bits\)"),
    "mlx_1_somewhere": ({"quantization": {"group_size": 32, "bits": 4, "lm_head": {"group_size": 32, "bits": 1}}},
                        lambda: packed(split_experts(weights(), "ffn.experts.{e}.{m}"), mlx(1)), r"MLX \(1 bits\)"),
    "not_yet_known": ({Q: {"quant_method": "sinq", "bits": 4}}, lambda: native(named(".q")), r"sinq \(4 bits\)"),
}  # fmt: skip


@pytest.mark.parametrize("form", FOREIGN)
def test_what_others_quantized_is_named(tmp_path: Path, form: str) -> None:
    settings, tensors, message = FOREIGN[form]
    folder = write(tmp_path / "m", tensors(), {**CONFIG, **settings})
    with pytest.raises(ModelError, match=message) as error:
        open_weights(folder)
    hint = error.value.hint or ""
    assert "which cannot be read" in error.value.message and hint and hint != FITS
    # Without the settings the names of the tensors tell at least that it is quantized, and nothing else is blamed.
    folder = write(tmp_path / "bare", tensors())
    with pytest.raises(ModelError) as error:
        open_weights(folder)
    if form not in ("not_yet_known", "gptq_p"):
        assert "quantized" in error.value.message or "biases" in error.value.message, error.value.message
        assert error.value.hint != FITS


def test_a_format_to_come_of_gptq_is_not_taken_for_a_known_one(tmp_path: Path) -> None:
    settings = {Q: {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v3"}}
    tensors, _ = quantized(apart(), lambda name, w: quantize_gptq(name, w, 4, 32, True))
    with pytest.raises(ModelError, match=r"quantized by GPTQ \(format gptq_v3\), which cannot be read"):
        open_weights(write(tmp_path / "m", tensors, CONFIG | settings))


def compressed(form: str, of: dict[str, Tensor]) -> Parts:
    """A matrix in one of compressed-tensors' forms; `of` hears its values."""

    def parts(name: str, w: Tensor) -> Tensors:
        count = 2 if form == "pack-quantized" else 1
        apart = w.view(len(w), count, -1)
        top = {"pack-quantized": 7, "int-quantized": 127, "float-quantized": 448}[form]
        scale = apart.abs().amax(2) / top
        scale = scale.max().view(1) if form == "float-quantized" else scale
        levels = apart / scale.view(-1, 1 if form == "float-quantized" else count, 1)
        levels = levels.to(torch.float8_e4m3fn) if form == "float-quantized" else levels.round().to(torch.int8)
        of[f"{name}.weight"] = (levels.float() * scale.view(-1, scale.shape[-1], 1)).view(w.shape)
        levels = levels.view(w.shape)
        if form != "pack-quantized":
            return {f"{name}.weight": levels, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.ones(1)}
        eights = (levels.long() + 8).view(len(w), -1, 8)
        packed = sum(eights[..., i] << 4 * i for i in range(8))
        assert isinstance(packed, Tensor)
        return {
            f"{name}.weight_packed": (packed - (packed >= 2**31) * 2**32).to(torch.int32),
            f"{name}.weight_scale": scale, f"{name}.weight_shape": torch.tensor(w.shape),
        }  # fmt: skip

    return parts


@pytest.mark.parametrize("form", ["float-quantized", "int-quantized", "pack-quantized"])
def test_symmetric_forms_of_compressed_tensors_are_read(tmp_path: Path, form: str) -> None:
    values: dict[str, Tensor] = {}
    stored = packed(apart(), compressed(form, values))
    config = {**CONFIG, Q: {"quant_method": "compressed-tensors", "format": form}}
    folder = write(tmp_path / "m", stored, config)
    block = "transformer.blocks.1"
    with open_weights(folder) as opened:
        name = f"{block}.norm_attn_norm.attn.out_proj.weight"
        assert torch.equal(opened.read(name, torch.float32), values[name])
        experts = [values[f"{block}.{APART.format(e=2, m=m)}.weight"] for m in ("w1", "v1", "w2")]
        for found, value in zip(opened.expert(1, 2), [*experts[:2], experts[2].t()], strict=True):
            assert torch.equal(found, value)
        assert (opened.kept is not None) == (form == "pack-quantized")
        if opened.kept is not None:
            for kept, value in zip(opened.kept_expert(1, 2), experts, strict=True):
                assert torch.allclose(groups.dequantize(kept), value, rtol=1e-6, atol=1e-7)
    gone = {name: tensor for name, tensor in stored.items() if not name.startswith("lm_head")}
    with pytest.raises(ModelError, match=r"lm_head\.weight"):  # not blamed on the form, which can be read
        open_weights(write(tmp_path / "gone", gone, config))


def test_settings_in_files_of_their_own(tmp_path: Path) -> None:
    for file, content, message in (
        ("quantize_config.json", {"bits": 5, "group_size": 32, "desc_act": False}, r"GPTQ \(5 bits\)"),
        ("quant_config.json", {"w_bit": 4, "version": "GEMV"}, "AWQ"),
    ):
        folder = write(tmp_path / Path(file).stem, packed(apart(), five_bits))
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(ModelError, match=message):
            open_weights(folder)


def test_files_under_names_of_exllama(tmp_path: Path) -> None:
    settings = {Q: {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0}}
    for number, (name, beside) in enumerate(
        {"output.safetensors": "x", "output-00001-of-00003.safetensors": "i"}.items()
    ):
        folder = write(
            tmp_path / str(number), packed(apart(), named(".q_weight", ".q_invperm")), {**CONFIG, **settings}
        )
        (folder / "model.safetensors").rename(folder / name)
        if beside == "i":  # the source's index is copied
            index = {"weight_map": {"lm_head.weight": "model-00001-of-00003.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=r"quantized by exl2 \(4.0 bits\)"):
            open_weights(folder)


@pytest.mark.parametrize(
    "settings", [{"quant_method": "bitsandbytes"}, {"quant_method": "gptq", "bits": 4}, {}, 7, None]
)
def test_settings_that_were_left_behind_hinder_nobody(tmp_path: Path, settings: Any) -> None:
    """Floats with the settings of a quantizer, as its program leaves them when it makes floats of them again."""
    with open_weights(write(tmp_path / "m", weights(), {**CONFIG, Q: settings})) as opened:
        assert torch.equal(opened.read("lm_head.weight"), weights()["lm_head.weight"])


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_gptq_says_its_format_under_either_key(tmp_path: Path, key: str) -> None:
    stored, values = quantized(apart(), lambda name, w: quantize_gptq(name, w, 4, 32, lowered=False))
    settings = {"quant_method": "gptq", "bits": 4, key: "gptq_v2"}
    config = {**CONFIG, "model_type": "dbrx_converted", Q: settings}  # GPTQModel's name for it
    with open_weights(write(tmp_path / "m", stored, config)) as opened:
        name = "transformer.blocks.1.norm_attn_norm.attn.out_proj.weight"
        assert torch.equal(opened.read(name, torch.float32), values[name])


@pytest.mark.parametrize("layout", [weights, apart])
def test_double_precision_is_told(tmp_path: Path, layout: Callable[[], Tensors]) -> None:
    folder = write(tmp_path / "m", {name: tensor.double() for name, tensor in layout().items()})
    with pytest.raises(ModelError, match="64 bits") as error:
        open_weights(folder)
    assert error.value.hint == "save the model in float32 or bfloat16"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["openvino_model.xml", "openvino_model.bin"], "OpenVINO"),
        (["model.onnx", "model.onnx_data"], "ONNX"),
        (["onnx/model.onnx"], "ONNX"),
        (["tf_model.h5"], "TensorFlow or Flax"),
        (["flax_model.msgpack"], "TensorFlow or Flax"),
        (["__0_0.distcp", ".metadata"], "distributed checkpoint"),
    ],
)
def test_models_for_other_programs_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=message) as error:
        open_weights(tmp_path)
    assert error.value.hint


def test_a_folder_of_one_gguf_model_is_that_model(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf")
    split = write_gguf(tmp_path / "split.gguf", split=9)
    lm_studio, parts = tmp_path / "publisher" / "model", tmp_path / "parts" / "Q4_K_M"
    for folder in (lm_studio, parts):
        folder.mkdir(parents=True)
    shutil.copy(whole, lm_studio / "dbrx-Q8_0.gguf")
    for name in ("mmproj-F16.gguf", "dbrx.imatrix.gguf", "README.md"):
        (lm_studio / name).touch()
    for part in sorted(tmp_path.glob("split-*.gguf")):
        shutil.copy(part, parts)
    for folder, expected in ((lm_studio, "dbrx-Q8_0.gguf"), (parts.parent, split.name)):
        assert resolve(folder).name == expected
        assert AutoTokenizer.from_pretrained(folder).encode("hello") == [259]
        assert DbrxForCausalLM.from_pretrained(folder).config.d_model == 64
    shutil.copy(whole, lm_studio / "dbrx-Q4_0.gguf")
    with pytest.raises(ModelError, match=r"holds 2 models: dbrx-Q4_0.gguf, dbrx-Q8_0.gguf") as error:
        resolve(lm_studio)
    assert error.value.hint == f"choose one: -m {lm_studio / 'dbrx-Q4_0.gguf'}"
    next(parts.glob("*-00001-*")).unlink()
    with pytest.raises(ModelError, match="part 1 of"):
        open_weights(resolve(parts))
    save_file({"x": torch.zeros(1)}, lm_studio / "model.safetensors")
    assert resolve(lm_studio) == lm_studio  # a checkpoint with GGUF files beside


def in_cache(cache: Path, name: str, file: Path, path: str) -> Path:
    """A file as llama.cpp puts it into the Hub's cache: a blob, a link, a ref; no listing, no config.json."""
    storage = cache / f"models--{name.replace('/', '--')}"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    link = storage / "snapshots" / ("c" * 40) / path
    for folder in (storage / "blobs", storage / "refs", link.parent):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, storage / "blobs" / digest)
    (storage / "refs" / "main").write_text("c" * 40)
    link.symlink_to(storage / "blobs" / digest)
    return link


def test_a_gguf_repository_in_the_cache_loads_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DBRX_CACHE", str(tmp_path / "dbrx"))
    link = in_cache(tmp_path / "hub", "acme/tiny-GGUF", write_gguf(tmp_path / "m.gguf"), "Q8/tiny-Q8_0.gguf")
    assert cli("generate", "-m", "acme/tiny-GGUF", "-n", "1", "--raw", "hello").code == 0
    assert cli("tokenize", "-m", "acme/tiny-GGUF", "hello").out == "259\n"
    assert cli("models", "path", "acme/tiny-GGUF").out == f"{link}\n"
    (model,) = inventory.inventory()
    assert (model.name, model.complete, model.gguf) == ("acme/tiny-GGUF", True, True)
    assert json.loads(cli("models", "list", "--json").out)[0]["format"] == "gguf"
    write_gguf(tmp_path / "s.gguf", split=9)
    first, second, *_ = sorted(tmp_path.glob("s-*.gguf"))
    in_cache(tmp_path / "hub", "acme/tiny-GGUF", first, f"Q4/{first.name}")
    ran = cli("generate", "-m", "acme/tiny-GGUF", "hello")
    assert ran.code == 3 and f"Q4/{second.name}" in ran.fault and "not complete" in ran.fault
    for part in sorted(tmp_path.glob("s-*.gguf"))[1:]:
        in_cache(tmp_path / "hub", "acme/tiny-GGUF", part, f"Q4/{part.name}")
    ran = cli("generate", "-m", "acme/tiny-GGUF", "hello")
    assert ran.code == 3 and "holds 2 models" in ran.fault and f"-m {link.parents[1] / 'Q4' / first.name}" in ran.fault


def test_ollamas_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    tags = tmp_path / "models" / "manifests" / "registry.ollama.ai" / "library" / "dbrx"
    blobs = tmp_path / "models" / "blobs"
    for folder in (tags, blobs):
        folder.mkdir(parents=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
    ]
    (tags / "latest").write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    shutil.copy(file, blobs / f"sha256-{digest}")
    for given in (tags / "latest", tmp_path / "models", blobs / f"sha256-{digest}"):
        assert resolve(given) == blobs / f"sha256-{digest}"
        assert AutoTokenizer.from_pretrained(given).encode("hello") == [259]
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    for name in ("dbrx", "dbrx:latest", "library/dbrx", "registry.ollama.ai/library/dbrx:latest"):
        assert resolve(f"ollama:{name}") == blobs / f"sha256-{digest}"
    mine = tags.parents[1] / "me" / "dbrx"
    shutil.copytree(tags, mine)
    listed = _listed(cli)
    assert listed.keys() == {"ollama:dbrx:latest", "ollama:me/dbrx:latest"}
    assert listed["ollama:dbrx:latest"]["bytes"] == file.stat().st_size and listed["ollama:dbrx:latest"]["complete"]
    assert "ollama rm dbrx" in cli("models", "remove", "ollama:dbrx", "--yes").fault
    shutil.rmtree(mine)
    for name, said in (("gone", "is not in ollama's store"), ("../dbrx", "is no name"), ("a/b/c/d", "is no name")):
        with pytest.raises(ModelError, match=said):
            resolve(f"ollama:{name}")
    (tags / "instruct").write_text(json.dumps({"layers": layers}))
    with pytest.raises(ModelError, match="holds 2 models: dbrx:instruct, dbrx:latest") as several:
        resolve(tmp_path / "models")
    assert several.value.hint == f"choose one: -m {tags / 'instruct'}"  # with what its maker set, which a blob has not
    (tags / "other").write_text(json.dumps({"layers": layers[:1]}))
    with pytest.raises(ModelError, match="names no GGUF file"):
        resolve(tags / "other")
    (blobs / f"sha256-{digest}").unlink()
    with pytest.raises(ModelError, match="is missing, the model of ollama:dbrx:latest") as error:
        resolve(tags / "latest")
    assert error.value.hint == "fetch it again: ollama pull dbrx:latest"


class Ollama:
    """A store with one model, whose manifest can be written anew."""

    def __init__(self, folder: Path) -> None:
        self.blobs, self.tag = folder / "blobs", folder / "manifests/registry.ollama.ai/me/dbrx/latest"
        self.blobs.mkdir(parents=True)
        self.tag.parent.mkdir(parents=True)
        self.model = write_gguf(folder / "m.gguf").read_bytes()

    def write(self, **layers: Any) -> ModelFiles:
        self.tag.write_text(
            json.dumps({"layers": [self.layer(*each) for each in {"model": self.model, **layers}.items()]})
        )
        return ModelFiles(resolve("ollama:me/dbrx"), manifest_of("ollama:me/dbrx"))

    def layer(self, kind: str, content: Any) -> dict[str, str]:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / f"sha256-{digest}").write_bytes(data)
        return {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"}


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Ollama:  # cli: it leaves no store
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    return Ollama(tmp_path / "models")


CHATML = b"{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"


@pytest.mark.filterwarnings("always:ollama")
def test_what_ollamas_manifest_says_is_followed_or_named(ollama: Ollama, cli: Cli) -> None:
    params = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "repeat_penalty": 1.5, "seed": 9,
              "frequency_penalty": 0.5, "presence_penalty": -1, "num_predict": 3, "mirostat": 0,
              "stop": ["<|im_start|>", "<|im_end|>"]}  # fmt: skip
    files = ollama.write(params=params, system=b"Be brief.", template=CHATML, license=b"MIT")
    with warnings.catch_warnings(action="error"):
        config = GenerationConfig.from_source(files)
    assert config.sampling() == SamplingParams(0.25, 0.5, 7, 0.125, 1.5, 0.5, -1, 3, 9)
    tokenizer = AutoTokenizer.from_pretrained("ollama:me/dbrx")
    assert tokenizer.eos_token_ids == (SPECIAL["<|endoftext|>"], SPECIAL["<|im_end|>"], SPECIAL["<|im_start|>"])
    asked = [Message("user", "hello")]
    assert tokenizer.chat_template.render(asked).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert tokenizer.chat_template.render([Message("system", ""), *asked]).startswith("<|im_start|>system\n<|im_end|>")
    ran = cli("generate", "-m", "ollama:me/dbrx", "hello", "--json")
    assert (json.loads(ran.out)["seed"], json.loads(ran.out)["usage"]["completion_tokens"]) == (9, 3), ran.err
    ollama.write(params={"num_ctx": 512, "stop": "###", "num_predict": -1, "temperature": "hot"},
                 template=b"{{ .System }} USER: {{ .Prompt }}", messages=[])  # fmt: skip
    ran = cli("generate", "-m", "ollama:me/dbrx", "hello", "-n", "1", "-t", "0", "--json")
    assert "dbrx: ollama:me/dbrx:latest: ignoring num_ctx, num_predict, stop, its messages, its template\n" in ran.err
    ran = cli("generate", "-m", "ollama:me/dbrx", "hello", "-n", "1")
    assert ran.code == 3 and "ollama:me/dbrx:latest: temperature must be a number, not 'hot'" in ran.err


@pytest.mark.parametrize(
    ("template", "same"),
    [
        (CHATML, True),
        (b"{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>assistant\n", True),
        (b"{{ .Prompt }}", False),
        (b"<|im_start|>user\nAnswer in verse: {{ .Prompt }}<|im_end|>", False),
        (b"[INST] {{ .Prompt }} [/INST]", False),
        (b"{{" * 100_000, False),
    ],
)
def test_templates_of_go_by_their_marks(template: bytes, same: bool) -> None:
    assert is_chatml(template.decode()) == same


def test_hostile_manifests_of_ollama(ollama: Ollama, tmp_path: Path, cli: Cli) -> None:
    ollama.write()
    good = json.loads(ollama.tag.read_text())["layers"]
    kind = "application/vnd.ollama.image."
    (tmp_path / "outside.json").write_text("{}")
    for layers, message in (
        ([{"mediaType": f"{kind}model", "digest": "sha256:../../../etc/passwd"}], "without a type or a digest"),
        ([{"mediaType": f"{kind}model", "digest": 7}], "without a type or a digest"),
        (["x"], "without a type or a digest"),
        ({"model": good}, "names no GGUF file"),
        (None, "names no GGUF file"),
        ([*good, ollama.layer("params", b"[1]")], r"is not a JSON object \(the params of ollama:me/dbrx:latest\)"),
        ([*good, ollama.layer("params", {"stop": {"a": 1}})], "its stop is no list of texts"),
        ([*good, ollama.layer("system", b"\xff")], r"is not UTF-8.*\(the system of"),
        ([*good, ollama.layer("system", b" " * 2**21)], "has 2097152 bytes, more than"),
        ([*good, ollama.layer("adapter", b"GGUF")], "has an adapter, which is not applied here"),
        ([*good, {"mediaType": f"{kind}system", "digest": "sha256:" + "0" * 64}], "is missing, the system of"),
    ):
        ollama.tag.write_text(json.dumps({"layers": layers}))
        with pytest.raises(ModelError, match=message) as error:
            AutoTokenizer.from_pretrained("ollama:me/dbrx")
        assert error.value.hint and "dbrx download" not in error.value.hint
    ollama.tag.write_bytes(b"\xff")
    with pytest.raises(ModelError, match="is not UTF-8") as error:
        resolve("ollama:me/dbrx")
    assert error.value.hint == "fetch it again: ollama pull me/dbrx:latest"
    with pytest.raises(ModelError, match="is not in ollama's store"):
        resolve(f"ollama:{'x' * 300}")
    ollama.tag.unlink()
    ollama.tag.mkdir()
    with pytest.raises(ModelError, match="is not in ollama's store"):
        resolve("ollama:me/dbrx")
    assert not _listed(cli)


def test_models_of_lm_studio_and_llama_cpp_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    studio, flat = tmp_path / ".lmstudio" / "models" / "acme" / "dbrx-GGUF", tmp_path / "llama.cpp"
    monkeypatch.setenv("LLAMA_CACHE", str(flat))
    for folder in (studio, flat):
        folder.mkdir(parents=True)
    first = write_gguf(studio / "m.gguf", split=10)
    single = write_gguf(flat / "acme_dbrx.gguf")
    write_gguf(flat / "other.gguf", arch="llama")
    link = in_cache(flat, "acme/other-GGUF", single, "Q8/dbrx-Q8_0.gguf")  # as llama.cpp does it now
    listed = _listed(cli)
    assert listed.keys() == {str(first), str(single), str(link)}
    assert listed[str(first)]["bytes"] == sum(part.stat().st_size for part in studio.iterdir())
    sorted(studio.iterdir())[-1].unlink()
    row = _listed(cli)[str(first)]
    assert not row["complete"] and len(row["missing"]) == 1


def _listed(cli: Cli) -> dict[str, Any]:
    """What `dbrx models` finds that is not made here."""
    rows = json.loads(cli("models", "list", "--json").out)
    return {row["name"]: row for row in rows if not row["name"].startswith("demo")}
