"""`dbrx export`: GGUF files that the gguf package reads, that load here again, and that llama.cpp runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file

from model import AutoTokenizer, DbrxForCausalLM
from model.bpe import cl100k_vocabulary, merges_of
from model.checkpoint import expected_tensors
from model.formats import open_weights, quantized
from model.quantization import dequantize
from tests.cli import Cli
from tests.gguf_files import CONFIG, SPECIAL, tensors, write_gguf
from tests.test_calibration import matrix_file
from tests.test_tokenizer_files import small_json
from tests.weights import make_checkpoint

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXT = "Hello, world! 12345 é 中文 \n\n  def f(x):\n\treturn x  😀 <|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with DBRX's tokenizer and a template, its rows multiples of 32."""
    found = make_checkpoint(tmp_path_factory.mktemp("export") / "m", {**CONFIG, "vocab_size": 100352}, 3, shards=2)
    (found / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "pad_token": "<|pad|>"}))
    return found


FALLBACKS = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0"}  # rows are no multiples of 256


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_1", "q4_0", *FALLBACKS])
def test_tensors_are_those_of_the_gguf_package(tmp_path: Path, cli: Cli, kind: str) -> None:
    out = tmp_path / "out.gguf"
    ran = cli("export", out, "--type", kind, "-m", write_gguf(tmp_path / "m.gguf"))
    assert (ran.code, ran.out) == (0, f"{out}\n")
    told = "10 matrices with rows of 64, no multiple of 256, become {} in place of {}\n"
    assert kind not in FALLBACKS or told.format(FALLBACKS[kind].upper(), kind.upper()) in ran.err
    kind = FALLBACKS.get(kind, kind)
    expected = tensors(CONFIG)
    found = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        to = GGMLQuantizationType.F32 if "norm" in name or "gate_inp" in name else GGMLQuantizationType[kind.upper()]
        assert found[name].tensor_type == to
        assert np.array_equal(found[name].data.view(np.uint8), gguf.quantize(value, to).view(np.uint8)), name


def test_k_quants_have_llama_quantizes_mixture_and_load(tmp_path: Path, cli: Cli) -> None:
    config = {
        **CONFIG, "d_model": 256, "n_layers": 4,
        "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 1, "moe_top_k": 1},
    }  # fmt: skip
    source, out = write_gguf(tmp_path / "m.gguf", config=config), tmp_path / "out.gguf"
    assert cli("export", out, "--type", "q4_k_m", "-m", source).code == 0
    finer = {f"blk.{layer}.{name}.weight" for layer in (2, 3) for name in ("attn_qkv", "ffn_down_exps")}
    found = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    assert {name for name, tensor in found.items() if tensor.tensor_type.name == "Q6_K"} == finer | {"output.weight"}
    for name, value in tensors(config).items():
        again = gguf.dequantize(found[name].data, found[name].tensor_type).reshape(value.shape)
        assert np.abs(again - value).std() < 0.08 * value.std(), name
    assert cli("generate", "-m", out, "-n", "1", "--raw", "hello").code == 0


def test_k_quants_of_experts_are_fitted_to_a_text_or_a_matrix(tmp_path: Path, cli: Cli) -> None:
    config = {
        **CONFIG, "d_model": 256, "n_layers": 1,
        "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 1, "moe_top_k": 1},
    }  # fmt: skip
    source, text, matrix = write_gguf(tmp_path / "m.gguf", config=config), tmp_path / "text", tmp_path / "matrix.dat"
    text.write_text("".join(f"{i} and {i + 7} are {i + i + 7}. " for i in range(60)))
    network = DbrxForCausalLM.from_pretrained(source)
    read: list[torch.Tensor] = []
    network.transformer.blocks[0].ffn.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    ids = AutoTokenizer.from_pretrained(source).encode(text.read_text())
    network(torch.tensor([ids]))
    gate, up = (tensors(config)[f"blk.0.ffn_{name}_exps.weight"][0] for name in ("gate", "up"))
    x = read[0].detach().flatten(0, -2).double().numpy()
    inner = x @ gate.T / (1 + np.exp(-(x @ gate.T))) * (x @ up.T)
    squares = {f"blk.0.ffn_{name}_exps.weight": (x**2).mean(0) for name in ("gate", "up")}
    squares["blk.0.ffn_down_exps.weight"] = (inner**2).mean(0)
    matrix_file(matrix, {name: each[None].astype(np.float32) for name, each in squares.items()}, np.ones(1, np.float32))

    def errors(*flags: str | Path) -> dict[str, float]:
        out = tmp_path / "out.gguf"
        out.unlink(missing_ok=True)
        ran = cli("export", out, "--type", "q4_k", "-m", source, *flags)
        assert ran.code == 0, ran.err
        found = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
        dequantized = {name: gguf.dequantize(found[name].data, found[name].tensor_type) for name in squares}
        weights = {name: tensors(config)[name].reshape(dequantized[name].shape) for name in squares}
        return {name: float((squares[name] * (dequantized[name] - weights[name]) ** 2).sum()) for name in squares}

    plain, of_text, of_matrix = errors(), errors("--calibrate", text), errors("--calibrate", matrix)
    for name in squares:
        assert of_text[name] < 0.97 * plain[name], name
        assert of_matrix[name] == pytest.approx(of_text[name], rel=0.01), name
    ran = cli("export", tmp_path / "other.gguf", "-m", source, "--calibrate", text)
    assert (ran.code, ran.out) == (2, "") and "--calibrate is for K-quants" in ran.err


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like it, with 258 tokens beside the special ones."""
    found = make_checkpoint(tmp_path_factory.mktemp("export") / "m", CONFIG, 3, shards=2)
    (found / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "pad_token": "<|pad|>"}))
    (found / "tokenizer.json").write_text(json.dumps(small_json()))
    return found


@pytest.mark.parametrize("size", ["small", pytest.param("folder", marks=pytest.mark.soak)])
def test_what_was_exported_loads_again(request: pytest.FixtureRequest, size: str, tmp_path: Path, cli: Cli) -> None:
    folder, out = request.getfixturevalue(size), tmp_path / "out.gguf"
    assert cli("export", out, "--type", "f32", "-m", folder).code == 0
    with open_weights(out) as exported, open_weights(folder) as original:
        assert exported.config == original.config
    network, again = DbrxForCausalLM.from_pretrained(folder), DbrxForCausalLM.from_pretrained(out)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.special_tokens == theirs.special_tokens and ours.chat_template.text == TEMPLATE
    turn, end, pad = (ours.special_tokens[name] for name in ("<|im_end|>", "<|endoftext|>", "<|pad|>"))
    assert ours.eos_token_ids == (turn, end) and theirs.eos_token_ids == (turn,)
    assert ours.pad_token_id == pad == theirs.pad_token_id
    header = {key: field.contents() for key, field in GGUFReader(out).fields.items()}
    assert (header["tokenizer.ggml.pre"], header["tokenizer.ggml.eot_token_id"]) == ("dbrx", turn)


def test_of_a_quantized_source_each_matrix_becomes_floats_once(
    small: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "int8", tmp_path / "out.gguf"
    assert cli("quantize", small, source, "--to", "int8").code == 0
    made: list[object] = []
    monkeypatch.setattr(quantized, "dequantize", lambda *given: made.append(given) or dequantize(*given))
    assert cli("export", out, "--type", "f32", "-m", source).code == 0
    assert len(made) == 2 * 5 * 3  # layers, experts, matrices
    with open_weights(out) as exported, open_weights(source) as original:
        for name in expected_tensors(original.config):
            assert torch.equal(exported.read(name), original.read(name, torch.float32)), name


@pytest.mark.parametrize(
    ("kind", "part", "value"),
    [
        ("f32", "norm_f.weight", "nan"),
        ("bf16", "wte.weight", "-inf"),
        ("q8_0", "experts.mlp.w1", "inf"),
        ("q4_1", "experts.mlp.w2", "nan"),
        ("q4_0", "router.layer.weight", "inf"),
    ],
)
def test_numbers_that_are_not_finite_are_named(
    small: Path, tmp_path: Path, cli: Cli, kind: str, part: str, value: str
) -> None:
    folder = shutil.copytree(small, tmp_path / "m")
    held = {name: shard for shard in folder.glob("*.safetensors") for name in load_file(shard) if name.endswith(part)}
    name, shard = held.popitem()
    weights = load_file(shard)
    weights[name].view(-1)[7] = float(value)
    save_file(weights, shard)
    ran = cli("export", tmp_path / "out.gguf", "--type", kind, "-m", folder)
    assert ran.code == 3 and not (tmp_path / "out.gguf").exists()
    assert ran.fault.startswith(f"dbrx: {shard}: {name} holds numbers that are not finite; ")


def test_no_token_is_there_twice(tmp_path: Path, cli: Cli) -> None:
    """llama.cpp ends at a file with two tokens of one name: what fills a gap is called as no other token is."""
    folder, values = make_checkpoint(tmp_path / "m", {**CONFIG, "vocab_size": 320}, 3), small_json()
    values["model"]["vocab"]["[PAD310]"] = 305
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert cli("export", tmp_path / "out.gguf", "--type", "f32", "-m", folder).code == 0
    tokens = GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == len(tokens) == 320
    assert tokens[300:307] == [*SPECIAL, "[[PAD304]", "[PAD310]", "[[PAD306]"]


@pytest.mark.slow
def test_merges_are_those_of_the_tokenizers_package() -> None:
    """Given as a BPE model to another implementation, vocabulary and merges make the same ids."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from model.bpe import CHARACTER_OF_BYTE, CL100K_PATTERN

    vocabulary = cl100k_vocabulary()

    def spelled(token: bytes) -> str:
        return "".join(CHARACTER_OF_BYTE[byte] for byte in token)

    merges = [(spelled(a), spelled(b)) for a, b in merges_of(vocabulary)]
    assert len(merges) == 100256 - 256
    other = Tokenizer(models.BPE({spelled(token): i for token, i in vocabulary.ids.items()}, merges))
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    from model.bpe import BytePairEncoder

    for text in (TEXT, (ROOT / "README.md").read_text("utf-8")):
        assert other.encode(text).ids == BytePairEncoder(vocabulary).encode(text)


def test_parts(tmp_path: Path, cli: Cli) -> None:
    source = write_gguf(tmp_path / "m.gguf", "bf16")
    ran = cli("export", tmp_path / "out.gguf", "--type", "bf16", "--split", "150K", "-m", source)
    files = [Path(line) for line in ran.out.splitlines()]
    assert ran.code == 0 and len(files) > 2 and files[0].name == f"out-00001-of-{len(files):05}.gguf"
    assert sorted(tmp_path.glob("out*")) == files
    with open_weights(files[1]) as parts, open_weights(source) as whole:
        for name in ("lm_head.weight", "transformer.blocks.1.ffn.experts.mlp.w2"):
            assert torch.equal(parts.read(name), whole.read(name))
    ran = cli("export", tmp_path / "out.gguf", "--type", "bf16", "--split", "150K", "-m", source)
    assert ran.code == 2 and "exists already" in ran.fault and not list(tmp_path.glob(".out*"))


def changed(folder: Path, to: Path, **ffn: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["ffn_config"] |= ffn
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_what_llama_cpp_cannot_run_is_told(folder: Path, tiny_checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out.gguf"
    gelu = changed(folder, tmp_path / "gelu", ffn_act_fn={"name": "gelu"})
    free = changed(folder, tmp_path / "free", moe_normalize_expert_weights=None)
    for model, message in (
        (gelu, "this model has gelu"),
        (free, "moe_normalize_expert_weights None"),
        (tiny_checkpoint, "rows of 48, which q8_0 cannot pack"),
    ):
        ran = cli("export", out, "-m", model)
        assert ran.code == 3 and message in ran.fault
    assert cli("export", tmp_path / "out.bin", "-m", folder).code == 2
    assert cli("export", out, "-m", folder, "--split", "much").code == 2
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.reference
def test_llama_cpp_gives_the_same_tokens(folder: Path, tmp_path: Path, cli: Cli) -> None:
    """Needs LLAMA_CPP_FOLDER: a folder in which `npm install node-llama-cpp` was run."""
    if not os.environ.get("LLAMA_CPP_FOLDER"):
        pytest.skip("LLAMA_CPP_FOLDER names no folder with node-llama-cpp")
    llama_cpp, out = os.environ["LLAMA_CPP_FOLDER"], tmp_path / "out.gguf"
    assert cli("export", out, "--type", "f32", "-m", folder).code == 0
    prompt = AutoTokenizer.from_pretrained(folder).encode("Hello, world! The capital of France is")
    network = DbrxForCausalLM.from_pretrained(folder, dtype="float32")
    ours = network.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=[])
    script = ROOT / "tests" / "reference" / "llama_cpp_greedy.mjs"
    command = ["node", str(script), llama_cpp, str(out), "24", *map(str, prompt)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert json.loads(ran.stdout.splitlines()[-1]) == ours[0, len(prompt) :].tolist()
