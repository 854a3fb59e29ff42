"""`dbrx convert`: a checkpoint in Databricks' layout from any other, whole or not there at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open

from model import AutoTokenizer, DbrxConfig
from model.checkpoint import Checkpoint
from model.errors import ModelError
from model.formats import open_weights, write_checkpoint
from model.generation_config import GenerationConfig
from model.weights import FloatExpert
from tests.cli import Cli
from tests.gguf_files import CONFIG, SPECIAL, write_gguf
from tests.weights import make_weights

torch.set_num_threads(1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, through safetensors' own reader."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def output(expert: FloatExpert, x: torch.Tensor) -> torch.Tensor:
    w1, v1, w2 = (matrix.float() for matrix in expert)
    return (torch.nn.functional.silu(x @ w1.T) * (x @ v1.T)) @ w2


def test_a_gguf_becomes_a_checkpoint(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write_gguf(tmp_path / "m.gguf", "bf16"), tmp_path / "new" / "out"
    monkeypatch.setattr(write_checkpoint, "SHARD_BYTES", 200_000)
    ran = cli("convert", path, out)
    assert (ran.code, ran.out) == (0, f"{out}\n")
    assert [each.name for each in out.parent.iterdir()] == ["out"]
    written, expected = tensors(out), make_weights(CONFIG, 3)
    assert written.keys() == expected.keys() and len(list(out.glob("*.safetensors"))) > 2
    for name, values in expected.items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name].float(), torch.from_numpy(values)), name
    with Checkpoint.open(out) as checkpoint:
        checkpoint.check(DbrxConfig.from_json(out / "config.json"))
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(path)
    assert ours.encode("hello world") == theirs.encode("hello world") and ours.special_tokens == SPECIAL
    assert ours.chat_template.text == theirs.chat_template.text
    assert GenerationConfig.from_folder(out).eos_token_id == (300, 303)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    same = [cli("generate", "-m", source, "-n", "4", "-t", "0", "hello").out for source in (path, out)]
    assert same[0] == same[1]


@pytest.mark.parametrize(("to", "dtype"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_quantized_weights_become_floats(tmp_path: Path, cli: Cli, to: str, dtype: torch.dtype) -> None:
    path, out = write_gguf(tmp_path / "m.gguf", "q4_0"), tmp_path / "out"
    assert cli("convert", path, out, "--to", to).code == 0
    written = tensors(out)
    with open_weights(path) as weights:
        for name, values in written.items():
            assert values.dtype == dtype and torch.equal(values, weights.read(name, dtype)), name


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_gguf_becomes_a_quantized_checkpoint(tmp_path: Path, cli: Cli, to: str) -> None:
    path, out = write_gguf(tmp_path / "m.gguf", "f32"), tmp_path / "out"
    assert cli("convert", path, out, "--to", to).code == 0
    with open_weights(out) as weights, open_weights(path) as original:
        assert weights.quantization == to and weights.config == original.config
        x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
        ours, theirs = output(weights.expert(1, 2), x), output(original.expert(1, 2), x)
        assert (ours - theirs).norm() < theirs.norm() * (0.03 if to == "int8" else 0.2)
    assert AutoTokenizer.from_pretrained(out).special_tokens == SPECIAL


def test_a_folder_keeps_its_tokenizer(small_checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(small_checkpoint, source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert cli("convert", source, out, "--to", "float16").code == 0
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert all(tensor.dtype == torch.float16 for tensor in tensors(out).values())
    assert DbrxConfig.from_json(out / "config.json") == DbrxConfig.from_json(source / "config.json")


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tiny_checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, source)
    rows = DbrxConfig.from_json(source / "config.json").vocab_size
    added = {str(rows): {"content": "<x>", "special": True}}
    (source / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    for command in ("convert", "quantize"):
        ran = cli(command, source, out, "--to", "int8")
        assert ran.code == 3 and f"vocab_size is {rows}" in ran.fault and not out.exists()


def test_what_is_there_is_not_touched(tmp_path: Path, cli: Cli) -> None:
    path, out = write_gguf(tmp_path / "m.gguf"), tmp_path / "out"
    out.mkdir()
    ran = cli("convert", path, out)
    assert ran.code == 2 and f"{out} exists already" in ran.fault and not list(out.iterdir())


def test_a_disk_that_is_too_small(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write_gguf(tmp_path / "m.gguf"), tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    ran = cli("convert", path, out)
    assert ran.code == 5 and "0.0 GB free" in ran.fault
    assert sorted(tmp_path.glob("*")) == [path] and not list(tmp_path.glob(".out*"))


def no_space(*_: Any) -> NoReturn:
    raise OSError(28, "No space left on device")


def too_large(*_: Any) -> NoReturn:
    raise OSError(27, "File too large")


def interrupted(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def damaged(*_: Any) -> NoReturn:
    raise ModelError("became shorter while it was in use")


@pytest.mark.parametrize(("fault", "code"), [(no_space, 5), (too_large, 2), (interrupted, 130), (damaged, 3)])
def test_a_fault_leaves_nothing(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, fault: Any, code: int
) -> None:
    path, out = write_gguf(tmp_path / "m.gguf"), tmp_path / "out"
    monkeypatch.setattr(write_checkpoint, "_write_at", fault)
    assert cli("convert", path, out).code == code
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_damaged_sources_are_told_before_anything_is_written(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    ran = cli("convert", tmp_path / "m.gguf", tmp_path / "out")
    assert ran.code == 3 and "too short" in ran.fault and not (tmp_path / "out").exists()
