"""Files that version 4ec79e8 wrote: they load, and the same tokens come out (tests/reference/make_old_files.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.chat_template import CHATML
from model.saved_cache import read_block
from tests.cli import Cli
from tests.reference.make_old_files import FIRST, SECOND
from tests.test_tokenizer_files import folder_of, small_json
from tests.weights import make_checkpoint

CONFIG: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 2,
    "max_seq_len": 512,
    "vocab_size": 320,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 1, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0},
}


def make_model(folder: Path) -> Path:
    """The model that the files belong to, in float32."""
    make_checkpoint(folder, CONFIG, seed=1, shards=1, eos_token_id=[256])
    return folder_of(folder, small_json(), tokenizer_class="GPT2Tokenizer", chat_template=CHATML)


OLD = Path(__file__).parent / "data" / "old_files"
REPLIES: dict[str, list[int]] = json.loads((OLD / "replies.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("old") / "model")


@pytest.fixture
def old(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, with the settings and the sessions among them in use."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.setenv("DBRX_CONFIG", str(tmp_path / "old" / "config.toml"))
    monkeypatch.setenv("DBRX_DATA", str(tmp_path / "old"))
    return tmp_path / "old"


def reply(cli: Cli, folder: Path, *options: str | Path) -> dict[str, Any]:
    """To the first question; temperature and length are those of the settings."""
    result = cli("generate", "-m", folder, "--json", *options, FIRST)
    assert result.code == 0, result.fault
    return dict(json.loads(result.out))


def made_by(file: Path) -> dict[str, str]:
    """What a saved file says that it was made by: of other weights on another day it would rightly be refused."""
    with file.open("rb") as opened:
        block = read_block(opened, file.stat().st_size)
    assert block is not None
    return dict(json.loads(block.metadata["made_by"]))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_checkpoints(cli: Cli, old: Path, scheme: str) -> None:
    assert reply(cli, old / scheme)["token_ids"] == REPLIES[scheme]


def test_a_prompt_cache(cli: Cli, old: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shutil.copy(old / "prompt.cache", old / "other.cache")
    fresh = cli("generate", "-m", folder, "--json", "--prompt-cache", other, FIRST)
    assert fresh.code == 0 and "the text is read anew" in fresh.fault
    monkeypatch.setattr("dbrx_cli.engine.fingerprint.fingerprint", lambda _: made_by(OLD / "prompt.cache"))
    taken_up = reply(cli, folder, "--prompt-cache", old / "prompt.cache")
    assert taken_up["token_ids"] == json.loads(fresh.out)["token_ids"] == REPLIES["floats"]
    assert taken_up["usage"]["cached_tokens"] == taken_up["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_a_journal(cli: Cli, old: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    """Whole it is only told again; where its end is lost, the reply goes on."""
    journal = old / "reply.journal"
    if cut:
        journal.write_bytes(journal.read_bytes()[:-100])
    monkeypatch.setattr("dbrx_cli.engine.fingerprint.of_request", lambda *_: made_by(OLD / "reply.journal"))
    assert reply(cli, folder, "--resume", journal)["token_ids"] == REPLIES["floats"]
    assert not list(old.glob("*damaged*"))


def test_sessions_and_settings(cli: Cli, old: Path, folder: Path) -> None:
    assert "rivers" in cli("sessions", "list").out
    shown = json.loads(cli("sessions", "export", "rivers", "--json").out)
    assert [turn["content"] for turn in shown["messages"]][::2] == [FIRST, SECOND]
    settings = cli("config", "show").out
    assert str(old / "config.toml") in settings
    assert len(reply(cli, folder, "--profile", "short")["token_ids"]) == 3
    gone_on = cli("chat", "-m", folder, "--session", "rivers", stdin="And Bonn?\n")
    assert gone_on.code == 0 and gone_on.out
    again = json.loads(cli("sessions", "export", "rivers", "--json").out)
    assert [turn["content"] for turn in again["messages"]][::2] == [FIRST, SECOND, "And Bonn?"]
