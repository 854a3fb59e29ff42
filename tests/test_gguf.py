"""GGUF files of DBRX: the logits, the tokens and the experts of the model that they were made from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from model import AutoTokenizer, DbrxConfig, DbrxForCausalLM
from model.checkpoint import Checkpoint
from model.errors import ModelError
from model.formats import open_weights
from model.formats.dequantize import row_bytes
from model.generation_config import GenerationConfig
from model.weights import FloatExpert
from tests.cli import Cli
from tests.gguf_files import CONFIG, NAMES, SPECIAL, write_gguf
from tests.weights import make_checkpoint, make_weights

torch.set_num_threads(1)

IDS = torch.tensor([[5, 17, 200, 3, 300, 42, 99]])
READABLE = """F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K
IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4""".split()


@torch.no_grad()
def logits(source: Path, **options: Any) -> torch.Tensor:
    """In memory of the process: where in a file weights begin can change the last bit of a product."""
    network = DbrxForCausalLM.from_pretrained(source, **options)
    network.load_state_dict({name: tensor.clone() for name, tensor in network.state_dict().items()}, assign=True)
    return torch.as_tensor(network(IDS).logits)


def by_gguf(path: Path) -> dict[str, torch.Tensor]:
    """All tensors under Databricks' names, through the gguf package's own reader."""
    ours = {theirs: name for name, theirs in NAMES.items()}
    found = {}
    for tensor in GGUFReader(path).tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        name = tensor.name
        if name.startswith("blk."):
            _, block, rest = name.split(".", 2)
            name = f"transformer.blocks.{block}.{ours[rest]}"
        else:
            name = ours[name]
        if values.dim() == 3:
            values = (values.transpose(1, 2) if name.endswith("w2") else values).flatten(0, 1)
        found[name] = values.contiguous()
    return found


@pytest.mark.parametrize(("kind", "dtype"), [("f32", "float32"), ("bf16", "bfloat16"), ("f16", "float16")])
def test_floats_give_the_logits_of_the_checkpoint(tmp_path: Path, kind: str, dtype: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind)
    folder = make_checkpoint(tmp_path / "folder", CONFIG, seed=3, dtype=dtype)
    network = DbrxForCausalLM.from_pretrained(path)
    assert str(network.dtype) == f"torch.{dtype}"
    assert network.config == DbrxConfig.from_json(folder / "config.json")
    assert torch.equal(logits(path), logits(folder))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q5_0"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_quantized_types_give_the_logits_of_their_values(tmp_path: Path, kind: str, dtype: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind)
    expected = DbrxForCausalLM(DbrxConfig.from_dict(CONFIG)).eval()
    expected.load_state_dict(by_gguf(path))
    expected.to(torch.bfloat16 if dtype == "auto" else torch.float32)
    network = DbrxForCausalLM.from_pretrained(path, dtype=dtype)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(network(IDS).logits, expected(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", READABLE)
def test_every_type_is_read_as_the_package_reads_it(tmp_path: Path, kind: str) -> None:
    """Random bits in all large tensors, through each way of reading."""
    config = {**CONFIG, "d_model": 256, "n_layers": 1}
    config["ffn_config"] = {"ffn_hidden_size": 256, "moe_num_experts": 2, "moe_top_k": 1}
    path = tmp_path / "m.gguf"
    rng = np.random.default_rng(1)
    to = GGMLQuantizationType[kind]

    def bits(value: Any, _: Any) -> Any:
        if kind == "F32":
            return value
        raw = rng.integers(0, 60, (*value.shape[:-1], row_bytes(kind, value.shape[-1])), np.uint8)
        return raw.view(np.float16) if kind == "F16" else raw

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.gguf_files.quantize", lambda v, t: bits(v, t) if t == to else v)
        write_gguf(path, kind, config)
    expected = by_gguf(path)
    with open_weights(path) as weights:
        for name, values in expected.items():
            assert torch.equal(weights.read(name, torch.float32), values), name
            as_stored = weights.read(name)
            assert torch.equal(as_stored, values.to(as_stored.dtype)), name
        for expert in range(2):
            for ours, matrix in zip(weights.expert(0, expert), ("w1", "v1", "w2"), strict=True):
                whole = expected[f"transformer.blocks.0.ffn.experts.mlp.{matrix}"].view(2, 256, 256)
                assert torch.equal(ours.float(), whole[expert]) and ours.is_contiguous()


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_an_expert_from_its_extents_is_the_expert(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind, split=9)
    with open_weights(path) as weights:
        for layer in range(2):
            for expert in range(5):
                extents = weights.expert_extents(layer, expert)
                assert len(extents) == 3
                data = tuple(read_extent(e.file, e.start, e.nbytes) for e in extents)
                from_data: FloatExpert = weights.expert(layer, expert, data)
                for ours, other in zip(from_data, weights.expert(layer, expert), strict=True):
                    assert ours.shape == (96, 64) and torch.equal(ours, other)


def read_extent(file: Path, start: int, nbytes: int) -> torch.Tensor:
    with file.open("rb") as handle:
        handle.seek(start)
        return torch.frombuffer(bytearray(handle.read(nbytes)), dtype=torch.uint8)


def test_a_split_model_is_given_by_any_part(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", split=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3 and first == parts[0]
    (tmp_path / "whole").mkdir()
    whole = logits(write_gguf(tmp_path / "whole" / "m.gguf"))
    for part in parts:
        assert torch.equal(logits(part), whole)
        assert AutoTokenizer.from_pretrained(part).encode("hello") == [259]


def test_sizes_and_closing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    with open_weights(path) as weights:
        stored = {name: weights.nbytes_of(name) for name in make_weights(CONFIG, 3)}
    assert sum(stored.values()) == sum(value.nbytes for value in make_weights(CONFIG, 3).values())
    with pytest.raises(ValueError, match="closed"):
        weights.read("lm_head.weight")


def test_owned_tensors_leave_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    with open_weights(path) as weights:
        mapped, owned = weights.read("lm_head.weight"), weights.read("lm_head.weight", owned=True)
    assert torch.equal(mapped, owned)
    with path.open("r+b") as file:
        content = file.read()
        file.seek(content.find(owned.numpy().tobytes()))
        file.write(bytes(4))
    assert mapped[0, 0] == 0 and owned[0, 0] != 0


def test_the_tokenizer_comes_from_the_header(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "hello world, 12345 é 中文\n\n  x\t😀 <|im_end|>"
    ids = tokenizer.encode(text)
    assert ids[:2] == [259, 264] and 303 not in ids and tokenizer.decode(ids) == text
    assert tokenizer.special_tokens == SPECIAL
    assert tokenizer.eos_token_ids == (300, 303) == GenerationConfig.from_source(path).eos_token_id
    assert (tokenizer.pad_token_id, tokenizer.bos_token) == (301, "<|endoftext|>")
    assert tokenizer.decode([310, 265]) == ""  # ids without a token
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    assert prompt[0] == 302 and prompt.count(303) == 1 and 259 in prompt
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.encode(text) == ids and again.special_tokens == SPECIAL
    assert again.apply_chat_template([{"role": "user", "content": "hello"}]) == prompt


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention.layer_norm_epsilon": 1e-6}, "norms have eps 1e-06"),
        ({"rope.scaling.type": "yarn"}, "scaled"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8, not the head's size of 16"),
        ({"attention.head_count": None}, "says no dbrx.attention.head_count"),
        ({"attention.head_count": "4"}, "attention.head_count is '4', not int"),
        ({"attention.head_count": 0}, "n_heads must be above 0"),
        ({"expert_used_count": 6}, "moe_top_k is 6"),
        ({"block_count": 3}, r"8 tensors \(blk.2.attn_norm.weight, .*are missing"),
        ({"block_count": 2000}, "too few for 2000 layers"),
        ({"block_count": 1}, "do not belong to DBRX"),
        ({"embedding_length": 128}, "has shape"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", values=values)
    with pytest.raises(ModelError, match=message) as error:
        open_weights(path)
    assert error.value.message.startswith(f"{path}: ")


def test_no_clamp(tmp_path: Path) -> None:
    for clamp in (0.0, 1e30):
        path = write_gguf(tmp_path / "m.gguf", values={"attention.clamp_kqv": clamp})
        with open_weights(path) as weights:
            assert weights.config.attn_config.clip_qkv is None


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    for name in ("elsewhere", "here"):
        (tmp_path / name).mkdir()
    path, link = write_gguf(tmp_path / "elsewhere" / "m.gguf"), tmp_path / "here" / "link.gguf"
    link.symlink_to(path)
    with open_weights(link) as weights:
        assert weights.source == path


def test_the_command_line(tmp_path: Path, cli: Cli) -> None:
    path = write_gguf(tmp_path / "m.gguf", "mxfp4")
    ran = cli("generate", "-m", path, "-n", "5", "-t", "0", "hello")
    assert ran.code == 0 and "the files hold MXFP4 weights, which become bfloat16" in ran.err
    assert cli("generate", "-m", path, "-n", "5", "-t", "0", "hello", "--dtype", "float32", "-q").err == ""
    assert cli("tokenize", "-m", path, "hello").out.split() == ["259"]
    ran = cli("generate", "-m", tmp_path / "gone.gguf", "hello")
    assert ran.code == 3 and f"{tmp_path / 'gone.gguf'} does not exist" in ran.fault


@pytest.mark.parametrize(("quantize", "flags"), [("int8", ["-n", "2", "hello"]), ("none", ["--batch", "-"])])
def test_numbers_that_are_not_finite_are_told_by_tensor_and_file(
    tmp_path: Path, cli: Cli, quantize: str, flags: list[str]
) -> None:
    """Of checkpoints and GGUF files: as they are read where they become int8, elsewhere as they are computed with."""
    path = write_gguf(tmp_path / "m.gguf")
    with open_weights(path) as weights:
        info = weights._file.tensors["blk.0.ffn_down_exps.weight"]  # type: ignore[attr-defined]
    assert cli("convert", "-q", path, tmp_path / "folder", "--to", "float32").code == 0
    name = "transformer.blocks.0.ffn.experts.mlp.w2"
    with Checkpoint.open(tmp_path / "folder") as checkpoint:
        same = checkpoint.tensors[name]
    for file, start in ((path, info.start), (same.file, same.start)):
        with file.open("r+b") as opened:
            opened.seek(start)
            opened.write(np.full(info.nbytes // 4, np.nan, np.float32).tobytes())
    for model, file, tensor in ((path, path, info.name), (tmp_path / "folder", same.file, name)):
        ran = cli(
            "generate", "-q", "--no-log", "-m", model, "--quantize", quantize, *flags, stdin='{"prompt": "hello"}\n'
        )
        assert ran.code == 3 and ran.fault.startswith(f"dbrx: {file}: {tensor} holds numbers that are not finite")
    out = tmp_path / "out"
    for arguments in (["quantize", path, out, "--to", "int8"], ["quantize", path, out, "--to", "int4"],
                      ["convert", path, out], ["trace", "-m", path, "--quantize", quantize, "hello"]):  # fmt: skip
        ran = cli(*arguments, "-q")
        assert ran.code == 3 and ran.fault.startswith(f"dbrx: {path}: {info.name} holds numbers")


def test_a_llama_is_refused_with_the_way_to_the_demo(tmp_path: Path, cli: Cli) -> None:
    path = write_gguf(tmp_path / "smollm.gguf", arch="llama")
    for command in ("generate", "tokenize"):
        ran = cli(command, "-m", path, "hello")
        assert ran.code == 3 and str(path) in ran.fault
        assert "'llama'" in ran.fault and "-m demo" in ran.fault
    shutil.copy(path, tmp_path / "smollm.gguf.part1of2")
    assert "join them: cat" in cli("generate", "-m", tmp_path / "smollm.gguf.part1of2", "hello").fault


def test_experts_streamed_from_the_file_give_the_same(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "q8_0")
    streamed = DbrxForCausalLM.from_pretrained(path, dtype="float32", offload="disk", expert_cache=2**20)
    resident = DbrxForCausalLM.from_pretrained(path, dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(streamed(IDS).logits, resident(IDS).logits, rtol=0, atol=1e-5)


def test_what_was_dequantized_leaves_memory(tmp_path: Path) -> None:
    """Pages that were dequantized are given back: what is left of the file in memory is less than a stack."""
    config = {**CONFIG, "d_model": 256, "n_layers": 1}
    config["ffn_config"] = {"ffn_hidden_size": 1024, "moe_num_experts": 16, "moe_top_k": 2}
    path = write_gguf(tmp_path / "m.gguf", "q8_0", config)

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().split("\n")
        start = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
        return 1024 * int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1])

    if not Path("/proc/self/smaps").exists():
        pytest.skip("needs Linux's /proc")
    with open_weights(path) as weights:
        for matrix in ("w1", "v1", "w2"):
            name = f"transformer.blocks.0.ffn.experts.mlp.{matrix}"
            weights.read(name)
        assert resident() < weights.nbytes_of(name)  # the system maps what lies around a page with it


def written_with(path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """A file whose tokenizer is written with other values; None leaves a call of the writer out."""
    for name, change in changes.items():
        method = getattr(gguf.GGUFWriter, name)
        told = (lambda self, value: None) if change is None else lambda self, v, m=method, c=change: m(self, c(list(v)))
        monkeypatch.setattr(gguf.GGUFWriter, name, told)
    return write_gguf(path)


def typed(**kinds: int) -> Any:
    """Other types for special tokens, by the middle of their names."""
    ids = {SPECIAL[f"<|{name}|>"]: kind for name, kind in kinds.items()}
    return lambda types: [ids.get(i, kind) for i, kind in enumerate(types)]


def renamed(names: dict[int, str]) -> Any:
    return lambda tokens: [names.get(i, token) for i, token in enumerate(tokens)]


@pytest.mark.parametrize(
    "types",
    [
        typed(im_end=1), typed(im_end=2), typed(im_end=4), typed(im_end=5), typed(im_start=1, im_end=1, endoftext=1),
        typed(im_start=5, im_end=4), None, lambda types: [1] * len(types),
    ],
)  # fmt: skip
def test_turns_end_by_spelling_whatever_the_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, types: Any) -> None:
    """llama.cpp takes <|im_end|> for the end of a turn by its spelling, and its template's tokens are never cut up."""
    path = written_with(tmp_path / "m.gguf", monkeypatch, add_token_types=types)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert set(tokenizer.eos_token_ids) == {300, 303} == set(GenerationConfig.from_source(path).eos_token_id)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello<|im_end|>"}], add_generation_prompt=True)
    assert [i for i in ids if i >= 300] == [302, 303, 302] and ids[-1] < 300
    assert tokenizer.decode(ids, skip_special_tokens=True).count("<|im_end|>") == 1


@pytest.mark.parametrize("spelling", ["<|eot_id|>", "<end_of_turn>", "<EOT>", "<|end|>", "<|eom_id|>"])
def test_other_ends_of_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    path = written_with(tmp_path / "m.gguf", monkeypatch, add_token_list=renamed({310: spelling}))
    assert AutoTokenizer.from_pretrained(path).eos_token_ids == (300, 303, 310)


def test_a_spelling_that_text_can_make_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = renamed({265: "<|", 266: "<|x", 267: "<|x|", 268: "<|x|>"})
    path = written_with(
        tmp_path / "m.gguf", monkeypatch, add_token_list=names, add_token_types=None,
        add_token_merges=lambda merges: [*merges, "< |", "<| x", "<|x |", "<|x| >"],
    )  # fmt: skip
    assert "<|x|>" not in AutoTokenizer.from_pretrained(path).special_tokens


@pytest.mark.parametrize(
    ("kind", "message"),
    [("imatrix", "importance matrix"), ("mmproj", "projector of a model that sees images")],
)
def test_files_that_are_no_models_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    monkeypatch.setattr(gguf.GGUFWriter, "add_type", lambda self, _: self.add_string("general.type", kind))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "clip" if kind == "mmproj" else "")
    writer.add_type("")
    writer.add_tensor("blk.0.attn_qkv.weight.in_sum2", np.ones((1, 64), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    for way in (open_weights, AutoTokenizer.from_pretrained, GenerationConfig.from_source):
        with pytest.raises(ModelError, match=message):
            way(tmp_path / "m.gguf")


@pytest.mark.parametrize("number", [42, 139, 230])
def test_types_of_other_programs_are_not_called_damage(tmp_path: Path, number: int) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_gate_exps.weight") + len(b"blk.0.ffn_gate_exps.weight") + 4 + 3 * 8
    path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ModelError, match=f"unknown type {number}, of a newer llama.cpp") as error:
        open_weights(path)
    assert error.value.hint is not None and "Q4_K_M" in error.value.hint


@pytest.mark.parametrize("name", [b"blk.0.attn_qkv.weight", b"output.weight"])
def test_the_older_form_of_an_importance_matrix_is_named(tmp_path: Path, name: bytes) -> None:
    entry = len(name).to_bytes(4, "little") + name + bytes([1, 0, 0, 0, 2, 0, 0, 0]) + bytes(8)
    (tmp_path / "imatrix.dat").write_bytes(b"\1\0\0\0" + entry)
    with pytest.raises(ModelError, match="is an importance matrix"):
        open_weights(tmp_path / "imatrix.dat")
