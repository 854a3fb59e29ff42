"""What the command line does with weights when it is not told: float ones become int8, all else stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from dbrx_cli.options import QuantizeName
from model import DbrxForCausalLM
from model.formats import open_weights
from model.formats.write_quantized import Writer
from model.quantization import SCHEMES
from tests.cli import Cli

NOTICE = "the weights become int8"


@pytest.fixture(autouse=True)
def _not_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DBRX_QUANTIZE")


def answer(cli: Cli, model: Path, *flags: str) -> tuple[dict[str, Any], str]:
    done = cli("generate", "-m", model, "--raw", "-t", "0", "-n", "4", "Hello there", "--json", *flags)
    assert done.code == 0, done.err
    return json.loads(done.out), done.err


def test_floats_become_int8_and_that_is_said(cli: Cli, tiny_checkpoint: Path) -> None:
    found, said = answer(cli, tiny_checkpoint)
    assert found["quantize"] == "int8" and said.count(NOTICE) == 1 and "--quantize none" in said
    asked, silent = answer(cli, tiny_checkpoint, "--quantize", "int8")
    assert asked["token_ids"] == found["token_ids"] and NOTICE not in silent
    assert NOTICE not in answer(cli, tiny_checkpoint, "--quiet")[1]


def test_a_prompt_of_several_chunks(cli: Cli, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = answer(cli, tiny_checkpoint)
    monkeypatch.setattr("model.scheduler.Scheduler._chunk", lambda *_: 1)
    assert whole["usage"]["prompt_tokens"] > 1
    assert answer(cli, tiny_checkpoint)[0]["token_ids"] == whole["token_ids"]


@pytest.mark.parametrize("flags", [["--quantize", "none"], ["--dtype", "float32"], ["--offload", "disk"]])
def test_what_is_asked_for_otherwise_stays_as_it_is_stored(cli: Cli, tiny_checkpoint: Path, flags: list[str]) -> None:
    found, said = answer(cli, tiny_checkpoint, *flags)
    assert found["quantize"] == "none" and NOTICE not in said
    assert found["dtype"] == ("float32" if "--dtype" in flags else "bfloat16")


def test_what_is_stored_in_few_bits_keeps_them(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with open_weights(tiny_checkpoint) as weights:
        Writer(weights, tmp_path / "int4", "int4", 32).write(lambda written: None)
    network = DbrxForCausalLM.from_pretrained(tmp_path / "int4", quantize="auto")
    assert network.kernels is not None and network.kernels.quantize == "int4" and not network.kernels.converts


def test_the_plan_names_the_form(cli: Cli, tiny_checkpoint: Path) -> None:
    formats = [
        json.loads(cli("plan", tiny_checkpoint, "--json", "--devices", "cpu=8GiB", *flags).out)["format"]
        for flags in ([], ["--quantize", "none"], ["--dtype", "float32"], ["--offload", "disk"])
    ]
    assert formats == ["int8", "bfloat16", "float32", "bfloat16"]


def test_the_library_stays_exact(tiny_checkpoint: Path) -> None:
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint)
    assert network.kernels is None and network.dtype == network.lm_head.weight.dtype


def test_compile_is_taken_with_a_notice(cli: Cli, tiny_checkpoint: Path) -> None:
    assert "--compile has no effect any more" in answer(cli, tiny_checkpoint, "--compile")[1]
    assert "--compile" not in cli("generate", "--help").out


def test_flags_name_the_schemes() -> None:
    assert get_args(QuantizeName) == ("auto", "none", *SCHEMES)
