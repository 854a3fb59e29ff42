"""Bad input ends in one clear line and the exit code of the contract."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli import Cli


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def lose_a_shard(folder: Path) -> None:
    next(iter(sorted(folder.glob("*-00002-of-*.safetensors")))).unlink()


def cut_a_shard(folder: Path) -> None:
    shard = next(iter(sorted(folder.glob("*-00002-of-*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (lose_a_shard, "shard 2 of 2 is missing"),
    "truncated shard": (cut_a_shard, "is truncated"),
    "wrong shape": (lambda f: edit_config(f, lambda c: c.update(d_model=60, n_heads=6)), "has shape"),
    "wrong depth": (lambda f: edit_config(f, lambda c: c.update(n_layers=2)), "not belong to this model"),
    "unknown key": (lambda f: edit_config(f, lambda c: c["ffn_config"].update(moe_capacity=2)), "'moe_capacity'"),
    "other architecture": (lambda f: edit_config(f, lambda c: c.update(model_type="llama")), "model_type is 'llama'"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")] and None, "holds no weights"),
    "broken template": (lambda f: (f / "chat_template.jinja").write_text("{% for %}") and None, "template"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_damaged_checkpoint_is_named(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, damage: str, command: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, folder)
    harm, message = DAMAGES[damage]
    harm(folder)
    args = ["hi"] if command == "generate" else []
    result = cli(command, "-m", folder, *args, stdin="" if args else "hi\n")
    assert (result.code, result.out) == (3, "")
    assert message in result.fault and str(folder) in result.fault and result.fault.startswith("dbrx: ")


@pytest.mark.parametrize(
    ("args", "stdin", "code", "message"),
    [
        pytest.param(["-m", "/no/such/folder", "hi"], b"", 3, "/no/such/folder", id="no folder"),
        pytest.param(["-m", "nobody/no-model", "hi"], b"", 3, "dbrx download nobody/no-model", id="not downloaded"),
        pytest.param(["-m", "not a name", "hi"], b"", 3, "not a name", id="no name"),
        pytest.param(["hi"], b"", 3, "-m demo", id="no model named"),
        pytest.param(["-m", "{tiny}"], b"", 2, "there is no prompt", id="no prompt"),
        pytest.param(["-m", "{tiny}", "-"], b" \n", 2, "there is no prompt", id="blank stdin"),
        pytest.param(["-m", "{tiny}"], b"good \xff bad", 2, "byte 0xff at offset 5", id="not UTF-8"),
        pytest.param(["-m", "{tiny}", "\udcff"], b"", 2, "the prompt is not UTF-8", id="argument not UTF-8"),
        pytest.param(["-m", "{tiny}", "--attn", "flash", "hi"], b"", 3, "needs an NVIDIA GPU", id="flash"),
        pytest.param(["-m", "{tiny}", "--device-map", "cuda", "hi"], b"", 3, "no device 'cuda'", id="no GPU"),
        pytest.param(["-m", "{tiny}", "--device-map", "gpu", "hi"], b"", 3, "'gpu' is not a device", id="no device"),
        pytest.param(["-m", "{tiny}", "--max-memory", "lots", "hi"], b"", 2, "0=70GiB", id="max-memory"),
        pytest.param(["-m", "{tiny}", "--context", "700", "hi"], b"", 2, "640 tokens", id="context"),
        pytest.param(["-m", "{tiny}", "word " * 700], b"", 6, "the context is 640", id="too long"),
        pytest.param(["-m", "{tiny}", "-t", "-1", "hi"], b"", 2, "temperature must be", id="temperature"),
        pytest.param(["-m", "{tiny}", "--top-p", "nan", "hi"], b"", 2, "top_p must be", id="nan"),
        pytest.param(["-m", "{tiny}", "-n", "0", "hi"], b"", 2, "max_tokens must be", id="no tokens"),
        pytest.param(["-m", "{tiny}", "--json", "--jsonl", "hi"], b"", 2, "exclude each other", id="json twice"),
        pytest.param(["-m", "{tiny}", "--raw", "-s", "x", "hi"], b"", 2, "no system message", id="raw system"),
        pytest.param(["-m", "{tiny}", "--colour", "hi"], b"", 2, "--colour", id="unknown flag"),
        pytest.param(["-m", "{tiny}", "-n", "many", "hi"], b"", 2, "must be a whole number", id="not a number"),
        pytest.param(["-m", "{tiny}", "--attn", "fast", "hi"], b"", 2, "fast", id="unknown choice"),
        pytest.param(["-m", "{tiny}", "--stop", "", "hi"], b"", 2, "--stop", id="empty stop string"),
        pytest.param(["-m", "{tiny}", "-x", "--schema", "s", "hi"], b"", 2, "exclude each other", id="extract, schema"),
        pytest.param(["-m", "{tiny}", "--logprobs", "3", "hi"], b"", 2, "needs --json", id="logprobs of a text"),
    ],
)
def test_one_line_and_the_exit_code(
    cli: Cli, tiny_checkpoint: Path, args: list[str], stdin: bytes, code: int, message: str
) -> None:
    result = cli("generate", *(arg.replace("{tiny}", str(tiny_checkpoint)) for arg in args), stdin=stdin)
    assert result.code == code, result.err
    assert result.out == "" and message in result.fault


def test_input_that_is_not_utf8_can_be_let_in(cli: Cli, tiny_checkpoint: Path) -> None:
    result = cli("generate", "-m", tiny_checkpoint, "-n", "2", "--input-errors", "replace", stdin=b"good \xff bad")
    assert (result.code, result.err) == (0, "")


def test_an_unexpected_fault_shows_its_traceback_only_when_asked(
    cli: Cli, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dbrx_cli.engine.local import LocalEngine

    monkeypatch.setattr(LocalEngine, "load", lambda *_: 1 / 0)
    result = cli("generate", "-m", tiny_checkpoint, "hi")
    assert result.code == 1 and "ZeroDivisionError" in result.fault and "DBRX_DEBUG=1" in result.fault
    monkeypatch.setenv("DBRX_DEBUG", "1")
    assert "Traceback" in cli("generate", "-m", tiny_checkpoint, "hi").err


NUMBERS = st.sampled_from(["-1", "0", "1", "7", "nan", "inf", "-inf", "1e308", "1e-308", "", " ", "x", "9" * 400])
FLAGS = st.sampled_from(
    """-t --top-p --top-k --min-p --repetition-penalty --frequency-penalty --presence-penalty --seed --threads --context
    --stop --dtype --attn --max-memory --device-map --input-errors -s -f -x --schema --batch --batch-size --output
    --logprobs --lookup""".split()
)


LINES = {"flags": st.lists(st.tuples(FLAGS, NUMBERS), max_size=3), "prompt": st.text(max_size=5)}


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**LINES)
def test_any_flags_end_in_the_contract(
    cli: Cli, small_checkpoint: Path, flags: list[tuple[str, str]], prompt: str
) -> None:
    _ends_in_the_contract(cli, small_checkpoint, flags, prompt)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**LINES)
def test_any_flags_end_in_the_contract_at_length(
    cli: Cli, small_checkpoint: Path, flags: list[tuple[str, str]], prompt: str
) -> None:
    _ends_in_the_contract(cli, small_checkpoint, flags, prompt)


def _ends_in_the_contract(cli: Cli, small_checkpoint: Path, flags: list[tuple[str, str]], prompt: str) -> None:
    words = [word for pair in flags for word in pair]
    result = cli("generate", "-m", small_checkpoint, "-n", "2", *words, "--", prompt)
    assert result.code in (0, 2, 3, 6), result.err
    assert "Traceback" not in result.err and "internal error" not in result.err
    told = [line for line in result.err.splitlines() if "reply is empty" not in line]  # two bytes may be no text
    assert len(told) == (result.code != 0), told


def linked(folder: Path, to: Path) -> Path:
    """A copy whose large files are the same."""
    shutil.copytree(
        folder, to, copy_function=lambda a, b: (os.link if a.endswith("safetensors") else shutil.copy)(a, b)
    )
    return to


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("flags", [[], ["-q"]])
def test_what_a_config_says_beyond_the_network_is_told_once(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, flags: list[str]
) -> None:
    folder = linked(tiny_checkpoint, tmp_path / "m")
    edit_config(folder, lambda c: c.update(fine_tuned_by="someone"))
    ran = cli("generate", "-m", folder, "-n", "1", *flags, "hi")
    told = f"dbrx: {folder / 'config.json'}: ignoring unknown key fine_tuned_by\n"
    assert (ran.code, ran.err) == (0, "" if flags else told)


def test_a_bad_default_is_named_and_a_flag_replaces_it(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = linked(tiny_checkpoint, tmp_path / "m")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": NaN}')
    ran = cli("generate", "-m", folder, "-n", "1", "hi")
    assert ran.code == 3 and "generation_config.json: temperature must be" in ran.fault and "-temperature" in ran.fault
    assert cli("generate", "-m", folder, "-n", "1", "-t", "0", "hi").code == 0
    ran = cli("convert", folder, tmp_path / "out")  # which has no such flag
    assert ran.code == 3 and "temperature must be" in ran.fault and "mend the file" in ran.fault
    assert "--temperature" not in ran.fault and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("template", "code", "message"),
    [
        ("{{ messages[0].nothing }}", 3, "makes no prompt of this conversation"),
        ("{% for i in range(700) %}a {% endfor %}", 6, "all but 2 from "),
    ],
)
def test_a_template_that_makes_nothing_or_too_much_is_named(
    cli: Cli, small_checkpoint: Path, tmp_path: Path, template: str, code: int, message: str
) -> None:
    folder = linked(small_checkpoint, tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    ran = cli("generate", "-m", folder, "hi")
    assert (
        ran.code == code and message in ran.fault and f"{folder / 'tokenizer_config.json'}: chat_template" in ran.fault
    )


def test_a_tokenizer_of_another_network_is_refused(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = linked(tiny_checkpoint, tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "TiktokenTokenizerWrapper", "added_tokens_decoder": {"100352": {"content": "<|new|>"}}}'
    )
    ran = cli("generate", "-m", folder, "hi")
    assert ran.code == 3 and str(folder / "config.json") in ran.fault and "tokenizer_config.json" in ran.fault
    assert "vocab_size is 100352" in ran.fault and "ids up to 100352" in ran.fault
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": 200000}')
    assert "an eos_token_id beside it is 200000" in cli("generate", "-m", folder, "hi").fault
