"""Experts fitted to what they read: the rounding against its textbook form, matrices of llama.cpp, whole runs."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import AutoTokenizer, DbrxConfig, DbrxForCausalLM
from model.calibration import ImatrixCalibration, TextCalibration
from model.chat_template import CHATML
from model.errors import ModelError
from model.formats import open_weights
from model.formats.imatrix import ImportanceMatrix, is_importance_matrix
from model.formats.write_quantized import Writer
from model.quantization import affine, dequantize, int4, quantize
from tests.cli import Cli
from tests.conftest import TINY
from tests.test_tokenizer_files import folder_of, small_json
from tests.weights import make_checkpoint

torch.set_num_threads(1)
Floats = NDArray[np.float32]
LAYERS, EXPERTS, HIDDEN, WIDTH = 2, 4, 40, 48
TEXT = "".join(f"{i} times {i} is {i * i}; " for i in range(60))
ONCE = np.ones(EXPERTS, np.float32)  # how often each expert was chosen


@pytest.fixture(scope="module")
def checkpoint_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts in two layers: fitting is done in PyTorch, operation by operation."""
    folder = tmp_path_factory.mktemp("checkpoints") / "four"
    ffn = {"ffn_hidden_size": HIDDEN, "moe_num_experts": EXPERTS, "moe_top_k": 2}
    settings = {"vocab_size": 320, "n_layers": LAYERS, "d_model": WIDTH, "ffn_config": ffn}
    make_checkpoint(folder, TINY | settings, seed=1, shards=1, eos_token_id=[256])
    return folder_of(folder, small_json(), tokenizer_class="GPT2Tokenizer", chat_template=CHATML)


def products(n: int, inputs: int) -> Tensor:
    """Mean products of inputs that go together."""
    x = torch.randn(n, inputs) @ torch.randn(inputs, inputs // 2) @ torch.randn(inputs // 2, inputs)
    return x.t() @ x / n


def test_errors_are_fed_back_as_the_inverse_of_the_products_says() -> None:
    """In float64, without a factorization: after each input its row and column leave the inverse."""
    torch.manual_seed(0)
    weight, moments = torch.randn(6, 160), products(500, 160)
    _, ranges = affine.fit(weight, 15, 32, moments)
    levels = affine.feed_back(weight, ranges, 15, 32, moments)
    scale, zero = (np.repeat(part[..., 0].float().numpy(), 32, axis=1).astype(np.float64) for part in ranges)
    w, h = weight.numpy().astype(np.float64), moments.numpy().astype(np.float64)
    inverse = np.linalg.inv(h + 0.01 * h.diagonal().mean() * np.eye(160))
    wanted = np.zeros_like(w)
    for i in np.argsort(-moments.diagonal().numpy(), kind="stable"):
        wanted[:, i] = np.clip(np.rint(w[:, i] / scale[:, i] + zero[:, i]), 0, 15)
        error = (w[:, i] - (wanted[:, i] - zero[:, i]) * scale[:, i]) / inverse[i, i]
        w -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    assert (levels.numpy() != wanted).mean() < 0.03  # a tie in float32 changes what comes after it


@pytest.mark.parametrize(("scheme", "group", "inputs"), [("int4", 32, 96), ("int4", 32, 80), ("int3", 128, 160)])
def test_what_is_known_of_the_inputs_makes_the_output_nearer(scheme: str, group: int, inputs: int) -> None:
    torch.manual_seed(1)
    weight, moments = torch.randn(20, inputs), products(400, inputs)
    moments *= torch.outer(*[torch.logspace(-1, 1, inputs)] * 2)

    def error(known: Tensor | None) -> float:
        off = dequantize(scheme, quantize(scheme, group, weight, known), group) - weight
        return float(((off @ moments) * off).sum())

    assert error(moments.diagonal()) < 0.9 * error(None)
    assert error(moments) < 0.5 * error(moments.diagonal())


@torch.no_grad()
def test_a_text_goes_through_the_layers_as_through_the_network(checkpoint_of_four: Path) -> None:
    network = DbrxForCausalLM.from_pretrained(checkpoint_of_four, dtype="float32")
    ids = torch.randint(0, 320, (1, 600), generator=torch.Generator().manual_seed(0))[0].tolist()
    with open_weights(checkpoint_of_four) as weights:
        calibration = TextCalibration(weights, ids)
        list(calibration.experts(1, lambda weight, known: int4.quantize(weight, 32, known)))  # passes 0, too
    exact = network.transformer(torch.tensor([ids[:512]])).last_hidden_state
    torch.testing.assert_close(network.transformer.norm_f(calibration._x), exact, rtol=1e-3, atol=1e-3)


def matrix_file(path: Path, squares: dict[str, Floats], counts: Floats, calls: int = 3) -> Path:
    """As llama-imatrix writes it, in the form of the suffix; squares [experts, inputs], counts [experts]."""
    if path.suffix == ".dat":
        entries = b"".join(
            struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, one.size) + (one * calls).tobytes()
            for name, one in squares.items()
        )
        path.write_bytes(struct.pack("<i", len(squares)) + entries + struct.pack("<ii", 1, 1) + b"t")
        return path
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    for name, one in squares.items():
        writer.add_tensor(f"{name}.in_sum2", one * counts[:, None])
        writer.add_tensor(f"{name}.counts", counts[:, None])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def squares_of(layers: int = LAYERS) -> dict[str, Floats]:
    random = np.random.default_rng(0)
    sizes = {"ffn_gate_exps": WIDTH, "ffn_up_exps": WIDTH, "ffn_down_exps": HIDDEN}
    return {
        f"blk.{layer}.{name}.weight": random.random((EXPERTS, size), np.float32)
        for layer in range(layers)
        for name, size in sizes.items()
    }


@pytest.mark.parametrize("suffix", [".dat", ".gguf"])
def test_importance_matrices_of_both_forms_are_read(checkpoint_of_four: Path, tmp_path: Path, suffix: str) -> None:
    squares, counts = squares_of(), np.arange(EXPERTS, dtype=np.float32)
    path = matrix_file(tmp_path / f"imatrix{suffix}", squares, counts)
    config = DbrxConfig.from_json(checkpoint_of_four / "config.json")
    assert is_importance_matrix(path)
    found = ImportanceMatrix(path, config)
    for name, matrix in (("ffn_gate_exps", 0), ("ffn_down_exps", 1)):
        np.testing.assert_allclose(found.squares(1, 3)[matrix], squares[f"blk.1.{name}.weight"][3], rtol=1e-5)
    if suffix == ".gguf":  # an expert that no token met has its layer's mean
        mean = np.average(squares["blk.1.ffn_up_exps.weight"], axis=0, weights=counts)
        gate = np.average(squares["blk.1.ffn_gate_exps.weight"], axis=0, weights=counts)
        np.testing.assert_allclose(found.squares(1, 0)[0], gate, rtol=1e-4)
        assert not np.allclose(mean, gate)
    with open_weights(checkpoint_of_four) as weights:
        out = tmp_path / "out"
        Writer(weights, out, "int4", 32, ImatrixCalibration(weights, path)).write(lambda written: None)
    with open_weights(out) as weights:
        assert weights.quantization == "int4"


BREAK: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-3000]),
    "lacks blk.1.ffn_gate_exps.weight": lambda path: matrix_file(path, squares_of(1), ONCE),
    "numbers for blk.0.ffn_gate_exps": lambda path: matrix_file(
        path, squares_of() | {"blk.0.ffn_gate_exps.weight": np.ones((EXPERTS, 8), np.float32)}, ONCE
    ),
    "and this model 2 layers": lambda path: matrix_file(path, squares_of(LAYERS + 1), ONCE),
    "no mean squares: negative": lambda path: matrix_file(
        path,
        squares_of() | {"blk.1.ffn_down_exps.weight": np.full((EXPERTS, HIDDEN), 1e38, np.float32)},
        ONCE,
    ),
    "that are no mean squares": lambda path: matrix_file(
        path,
        squares_of() | {"blk.0.ffn_gate_exps.weight": np.full((EXPERTS, WIDTH), np.nan, np.float32)},
        ONCE,
    ),
}


@pytest.mark.parametrize("message", BREAK)
def test_a_matrix_of_another_model_is_refused_in_a_line(
    checkpoint_of_four: Path, tmp_path: Path, cli: Cli, message: str
) -> None:
    path = matrix_file(tmp_path / "imatrix.dat", squares_of(), ONCE)
    BREAK[message](path)
    result = cli("quantize", str(checkpoint_of_four), str(tmp_path / "out"), "--to", "int4", "--calibrate", str(path))
    assert result.code == 3 and message in result.err and result.err.count("\n") <= 2
    assert not (tmp_path / "out").exists()


def test_quantizing_tells_what_it_cost(checkpoint_of_four: Path, tmp_path: Path, cli: Cli) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    found = {}
    for name, flags in {"plain": ("--quality",), "calibrated": ("--calibrate",)}.items():
        out = tmp_path / name
        result = cli("quantize", str(checkpoint_of_four), str(out), "--to", "int4", *flags, str(text), "--json")
        assert result.code == 0, result.err
        found[name] = json.loads(result.out)
        assert found[name]["folder"] == str(out)
    assert 0 < found["calibrated"]["quality"]["kl_nats"] < found["plain"]["quality"]["kl_nats"]
    ids = AutoTokenizer.from_pretrained(checkpoint_of_four).encode(TEXT)
    assert found["calibrated"]["quality"]["tokens"] == len(ids) // 8 and found["plain"]["quality"]["tokens"] == min(
        1024, len(ids)
    )


def test_flags_that_a_scheme_has_no_use_for_are_refused(checkpoint_of_four: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("quantize", str(checkpoint_of_four), str(tmp_path / "out"), "--to", "int8", "--calibrate", "x.txt")
    assert result.code == 2 and "--calibrate is for --to int4, int3" in result.err
    result = cli("quantize", str(checkpoint_of_four), str(tmp_path / "out"), "--to", "int3", "--group", "32")
    assert result.code == 2 and "--group 32 is for --to int4" in result.err


def test_an_interrupted_run_goes_on_with_its_text_only(checkpoint_of_four: Path, tmp_path: Path) -> None:
    ids = list(range(300))

    def run(out: str, stop: float = 2) -> dict[str, int]:
        def interrupt(done: int, total: int) -> None:
            if done > stop * total:
                raise KeyboardInterrupt

        with open_weights(checkpoint_of_four) as weights:
            calibration = TextCalibration(weights, ids)
            Writer(weights, tmp_path / out, "int4", 32, calibration).write(lambda written: None, interrupt)
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / out).glob("*.safetensors")}

    with pytest.raises(KeyboardInterrupt):
        run("broken", 0.6)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".broken.quantizing").glob("*.safetensors")}
    after = run("broken")
    assert before and before.items() <= after.items()
    run("whole")
    for name in after:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with open_weights(
        checkpoint_of_four
    ) as weights:  # which stands in the parts, so that those of another are made anew
        assert TextCalibration(weights, ids).digest != TextCalibration(weights, ids[::-1]).digest


def test_a_file_that_is_no_model_and_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(b"")
    assert not is_importance_matrix(path)
    with pytest.raises(ModelError):
        ImportanceMatrix(path, DbrxConfig())
