"""`dbrx chat`: a script from a pipe, and a real terminal (pexpect types, pyte is the screen)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbrx_cli.commands import chat
from model import AutoTokenizer, DbrxForCausalLM, Message
from tests.cli import COMMAND, SOON, Cli
from tests.fake_chat import FakeEngine
from tests.terminal import Terminal

pytestmark = pytest.mark.slow  # whole runs and sessions

TURNS = ["My name is Ada.", "What is my name?", "Spell it."]
NEW = 10


def fresh_replies(folder: Path, turns: list[str]) -> list[str]:
    """The replies of a conversation in which each turn is read from its beginning."""
    import torch

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = DbrxForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    messages: list[Message] = []
    for turn in turns:
        messages.append(Message("user", turn))
        ids = tokenizer.encode_segments(tokenizer.chat_template.segments(messages, add_generation_prompt=True))
        out = network.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=list(tokenizer.eos_token_ids)
        )
        messages.append(Message("assistant", tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True)))
    return [message.content for message in messages if message.role == "assistant"]


def test_a_script_is_answered_a_turn_a_line_from_a_kept_cache(cli: Cli, tiny_checkpoint: Path) -> None:
    flags = ("chat", "-m", tiny_checkpoint, "-t", "0", "-n", str(NEW), "--dtype", "float32", "-v")
    result = cli(*flags, stdin="\n".join(TURNS) + "\n")
    assert result.code == 0
    assert result.out == "".join(reply + "\n" for reply in fresh_replies(tiny_checkpoint, TURNS))
    cached = [int(n) for n in re.findall(r"\((\d+) cached\)", result.err)]
    assert len(cached) == 2 and cached[0] > 20 and cached[1] > cached[0]


def test_commands_in_a_script(cli: Cli, tiny_checkpoint: Path) -> None:
    script = "hello\n/clear\nhello\n/qqq\n/sytem x\n/system Be brief.\n/system\nhello\n/bye\nnever read\n"
    result = cli("chat", "-m", tiny_checkpoint, "-t", "0", "-n", "5", stdin=script)
    assert result.code == 0
    for line in ("new conversation", "no command /qqq; /help", "did you mean /system?", "Be brief."):
        assert line in result.err
    lines = result.out.removesuffix("\n")
    assert lines and "never read" not in result.err


def test_blocks_and_backslashes_open_more_lines(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "open_engine", lambda options, report: FakeEngine())
    for script in ('"""one\ntwo"""\n', "one\\\ntwo\n", '"""\none\ntwo\n"""\n'):
        assert cli("chat", "-m", "fake", stdin=script).out == "You said: one\ntwo\n"


def test_bytes_that_are_no_text_name_the_line(cli: Cli, tiny_checkpoint: Path) -> None:
    result = cli("chat", "-m", tiny_checkpoint, "-n", "2", stdin=b"hello\nbad \xff\n")
    assert result.code == 2 and "line 2 of stdin is not UTF-8: byte 0xff at offset 4" in result.fault
    assert "--input-errors" not in result.fault  # which chat has not


def test_a_full_context_drops_the_oldest_turns_and_says_so(cli: Cli, tiny_checkpoint: Path) -> None:
    script = "".join(f"This is message number {i} of a long talk.\n" for i in range(8))
    result = cli("chat", "-m", tiny_checkpoint, "-t", "0", "-n", "12", "--context", "120", stdin=script)
    assert result.code == 0
    assert "the context is full" in result.err and "no longer read" in result.err


def test_a_message_that_never_fits_ends_a_script_with_6(cli: Cli, tiny_checkpoint: Path) -> None:
    result = cli("chat", "-m", tiny_checkpoint, "-n", "2", "--context", "50", stdin="word " * 80 + "\n")
    assert result.code == 6 and "the context is 50" in result.fault


@pytest.fixture(scope="module")
def terminal(tiny_checkpoint: Path) -> Iterator[Terminal]:
    """One process for the tests in a terminal, which come in their order."""
    opened = Terminal([*COMMAND, "chat", "-m", str(tiny_checkpoint), "-t", "0", "-n", "8"], rows=60)
    opened.until(">>>", seconds=240)
    yield opened
    opened.end()


@pytest.mark.timeout(300)  # on a busy machine, a process that reads torch begins late
def test_a_conversation_in_the_terminal(terminal: Terminal) -> None:
    terminal.type("hello\r")
    terminal.until(lambda text: text.count(">>>") == 2 and ">>> hello" in text and "tokens/s" in text)
    terminal.type("/regen\r")
    terminal.until(lambda text: re.search(r"reads \d tokens?", text) and text.count(">>>") == 3)
    terminal.type("/trace\r")
    terminal.until(lambda text: "experts in use" in text, seconds=60)


def test_ctrl_c_stops_the_reply_and_the_talk_goes_on(terminal: Terminal) -> None:
    terminal.type("\x0c/set max_tokens 500\r")
    terminal.until("max_tokens is now 500")
    terminal.type("hello\r")
    terminal.until(lambda text: len(text.partition(">>> hello")[2]) > 200)
    asked = time.monotonic()
    terminal.type("\x03")
    terminal.until("stopped; /continue goes on")
    assert time.monotonic() - asked < SOON
    terminal.until(lambda text: text.count(">>>") == 3)
    terminal.type("/clear\r")
    terminal.until("new conversation")


def test_a_narrow_window_and_the_end(terminal: Terminal) -> None:
    terminal.resize(40, 60)
    terminal.type("\x0c/set max_tokens 30\r")
    terminal.until("max_tokens is now 30")
    terminal.type("hello\r")
    terminal.until(lambda text: ">>> hello" in text and text.count(">>>") == 3)
    assert all(len(line) <= 40 for line in terminal.text.splitlines())
    terminal.type("/exit\r")
    assert terminal.leave() == 0


def test_a_session_keeps_its_cache(cli: Cli, tiny_checkpoint: Path) -> None:
    """What was said is neither read again in the next run nor answered in another way."""
    flags = ("chat", "-m", tiny_checkpoint, "-t", "0", "-n", str(NEW), "--dtype", "float32", "-v")
    first = cli(*flags, "--session", "kept", stdin="\n".join(TURNS[:2]) + "\n")
    then = cli(*flags, "-c", stdin=TURNS[2] + "\n")
    assert first.code == then.code == 0
    assert first.out + then.out == "".join(reply + "\n" for reply in fresh_replies(tiny_checkpoint, TURNS))
    (cached,) = (int(n) for n in re.findall(r"\((\d+) cached\)", then.err))
    assert cached > 40
    (folder,) = (Path(os.environ["DBRX_DATA"]) / "caches",)
    assert [path.name for path in folder.iterdir()] == ["1.kv"]


def test_continue_goes_on_where_the_limit_was(cli: Cli, tiny_checkpoint: Path) -> None:
    flags = ("chat", "-m", tiny_checkpoint, "-t", "0", "--dtype", "float32", "-n")
    parts = cli(*flags, "5", stdin="Tell me about the sea.\n/continue\n")
    whole = cli(*flags, "10", stdin="Tell me about the sea.\n")
    assert (parts.code, whole.code) == (0, 0), (parts, whole)
    assert parts.out.replace("\n", "") == whole.out.replace("\n", ""), (parts, whole)


def test_no_log_keeps_nothing(cli: Cli, tiny_checkpoint: Path) -> None:
    assert cli("chat", "-m", tiny_checkpoint, "-n", "2", "--no-log", stdin="hello\n").code == 0
    assert not Path(os.environ["DBRX_DATA"]).exists()
    result = cli("chat", "-m", tiny_checkpoint, "-c", stdin="")
    assert result.code == 2 and "there is no session to take up" in result.fault
    result = cli("chat", "-m", tiny_checkpoint, "-c", "--session", "x", stdin="")
    assert result.code == 2 and "exclude each other" in result.fault


def test_help_needs_nothing_heavy() -> None:
    from tests.test_imports import loaded_by

    code = "from dbrx_cli.app import app\ntry: app(['chat', '--help'])\nexcept SystemExit: pass"
    assert not {"torch", "prompt_toolkit", "huggingface_hub", "sqlite3"} & loaded_by(code)
