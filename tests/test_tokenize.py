"""`dbrx tokenize`: ids against known ones, exact spans, and the way back."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pexpect
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.bpe import cl100k_vocabulary
from model.tokenizer import Tokenizer
from tests.cli import COMMAND, ROOT, Cli, environment
from tests.terminal import spawn
from tests.test_imports import loaded_by

pytestmark = pytest.mark.slow  # whole runs and sessions

TEXT = "héllo  👋🏽<|im_end|> مرحبا\n"


@pytest.fixture(autouse=True)
def no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint on this machine: the default model's vocabulary is built in."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def run_json(cli: Cli, *args: str, stdin: str = "") -> dict[str, Any]:
    result = cli("tokenize", "--json", *args, stdin=stdin)
    assert (result.code, result.err) == (0, "")
    answer: dict[str, Any] = json.loads(result.out)
    return answer


def test_known_ids_one_a_line(cli: Cli) -> None:
    # The ids that tiktoken's documentation gives for cl100k_base.
    assert cli("tokenize", "hello world").out == "15339\n1917\n"
    assert cli("tokenize", stdin="hello world").out == "15339\n1917\n"
    assert cli("tokenize", "-", stdin="hello world\n").out == "15339\n1917\n198\n"
    assert cli("tokenize", "--count", "hello world").out == "2\n"
    assert cli("tokenize", "").out == "" and cli("tokenize", "--count", "").out == "0\n"


def test_spans_are_exact(cli: Cli) -> None:
    tokens = run_json(cli, TEXT)["tokens"]
    data = TEXT.encode()
    assert tokens[0]["start"] == 0 and tokens[-1]["end"] == len(data)
    for token, following in zip(tokens, [*tokens[1:], {"start": len(data)}], strict=True):
        assert token["end"] == following["start"]
        piece = data[token["start"] : token["end"]]
        assert bytes.fromhex(token["bytes"]) == piece
        assert token["text"] is None or token["text"].encode() == piece
    assert any(token["text"] is None for token in tokens)
    assert not any(token["special"] for token in tokens)


def test_a_spelling_is_special_only_from_the_template(cli: Cli) -> None:
    tokens = run_json(cli, "--chat", "hi<|im_end|>")["tokens"]
    special = [token["text"] for token in tokens if token["special"]]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert "".join(token["text"] for token in tokens) == (
        "<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_there_and_back(cli: Cli, text: str) -> None:
    ids = cli("tokenize", stdin=text.removeprefix("\ufeff")).out
    back = cli("tokenize", "--decode", stdin=ids)
    assert back.code == 0 and back.out.encode() == text.removeprefix("\ufeff").encode()


@pytest.mark.parametrize("spelled", ["15339 1917", "15339,1917", "[15339, 1917]", "15339\n1917\n"])
def test_ids_in_several_spellings(cli: Cli, spelled: str) -> None:
    assert cli("tokenize", "--decode", spelled).out == "hello world"
    assert cli("tokenize", "--decode", "--count", spelled).out == "2\n"


def test_special_tokens_and_gaps_are_decoded(cli: Cli) -> None:
    assert cli("tokenize", "--decode", "100278 882 100256 100279").out == "<|im_start|>user<|im_end|>"
    assert run_json(cli, "--decode", "100256")["tokens"] == [
        {"id": 100256, "bytes": "", "text": "", "start": 0, "end": 0, "special": False}
    ]


def test_a_part_of_a_character_passes_a_pipe_as_its_bytes() -> None:
    ids = Tokenizer(cl100k_vocabulary()).encode("👋")
    done = subprocess.run(
        [*COMMAND, "tokenize", "--decode", str(ids[0])], env=environment(), cwd=ROOT, capture_output=True
    )
    assert done.stdout and "👋".encode().startswith(done.stdout)


@pytest.mark.parametrize(
    "args, stdin, code, words",
    [
        (["--decode", "12 x"], b"", 2, "'x' is not a token id"),
        (["--decode", "-5"], b"", 2, "--help"),
        (["--decode", "100280"], b"", 2, "end at 100279"),
        ([], b"ab\xff", 2, "offset 2"),
        (["--decode", "--chat", "1"], b"", 2, "exclude"),
        (["-m", "/nowhere/at/all", "hi"], b"", 3, "/nowhere"),
        (["-m", "acme/none", "hi"], b"", 3, "acme/none"),
    ],
)
def test_faults(cli: Cli, args: list[str], stdin: bytes, code: int, words: str) -> None:
    result = cli("tokenize", *args, stdin=stdin)
    assert (result.code, result.out) == (code, "") and words in result.fault


def test_a_checkpoints_own_tokenizer(cli: Cli, tiny_checkpoint: Path) -> None:
    assert run_json(cli, "-m", str(tiny_checkpoint), "hello world")["count"] == 2


def test_the_table_of_a_terminal_fits_40_columns() -> None:
    terminal = spawn("tokenize", "--chat", TEXT + "\x1b]0;owned\x07[bold]", columns=40, rows=60, NO_COLOR="1")
    terminal.expect(pexpect.EOF)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.before or "")
    assert "\x1b" not in shown and "\x07" not in shown
    assert "part of" in shown and "<|im_start|>" in shown and "15339" not in shown
    assert all(len(line) <= 40 for line in shown.splitlines() if line.isascii())
    assert "tokens" in shown.splitlines()[-1]


def test_it_starts_without_torch(tiny_checkpoint: Path) -> None:
    code = f"from dbrx_cli.app import app\ntry: app(['tokenize', '-m', {str(tiny_checkpoint)!r}, 'hello'])\n"
    code += "except SystemExit: pass"
    assert not {"torch", "accelerate", "rich"} & loaded_by(code)
