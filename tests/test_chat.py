"""`dbrx chat`: a script from a pipe, and a real terminal (pexpect types, pyte is the screen)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pyte
import pytest

from model import AutoTokenizer, DbrxForCausalLM, Message
from tests.cli import COMMAND, ROOT, Cli, environment

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


def test_a_script_is_answered_a_turn_a_line_from_a_kept_cache(cli: Cli, checkpoint: Path) -> None:
    result = cli(
        "chat", "-m", checkpoint, "-t", "0", "-n", str(NEW), "--dtype", "float32", "-v", stdin="\n".join(TURNS) + "\n"
    )
    assert result.code == 0
    assert result.out == "".join(reply + "\n" for reply in fresh_replies(checkpoint, TURNS))
    cached = [int(n) for n in re.findall(r"\((\d+) cached\)", result.err)]
    assert len(cached) == 2 and cached[0] > 20 and cached[1] > cached[0]


def test_commands_in_a_script(cli: Cli, tiny_checkpoint: Path) -> None:
    script = "hello\n/clear\nhello\n/nonsense\n/sytem x\n/system Be brief.\n/system\nhello\n/bye\nnever read\n"
    result = cli("chat", "-m", tiny_checkpoint, "-t", "0", "-n", "5", stdin=script)
    assert result.code == 0
    for line in ("new conversation", "no command /nonsense; /help", "did you mean /system?", "Be brief."):
        assert line in result.err
    lines = result.out.removesuffix("\n")
    assert lines and "never read" not in result.err


def test_blocks_and_backslashes_open_more_lines(cli: Cli, tiny_checkpoint: Path) -> None:
    def reply(script: str) -> str:
        return cli("chat", "-m", tiny_checkpoint, "-t", "0", "-n", "5", stdin=script).out

    assert reply('"""one\ntwo"""\n') == reply("one\\\ntwo\n") == reply('"""\none\ntwo\n"""\n')
    assert reply("one two\n") != reply("one\\\ntwo\n")


def test_bytes_that_are_no_text_name_the_line(cli: Cli, tiny_checkpoint: Path) -> None:
    result = cli("chat", "-m", tiny_checkpoint, "-n", "2", stdin=b"hello\nbad \xff\n")
    assert result.code == 2 and "line 2 of stdin is not UTF-8: byte 0xff at offset 4" in result.fault


def test_a_full_context_drops_the_oldest_turns_and_says_so(cli: Cli, tiny_checkpoint: Path) -> None:
    script = "".join(f"This is message number {i} of a long talk.\n" for i in range(8))
    result = cli("chat", "-m", tiny_checkpoint, "-t", "0", "-n", "12", "--context", "120", stdin=script)
    assert result.code == 0
    assert "the context is full" in result.err and "no longer read" in result.err


def test_a_message_that_never_fits_ends_a_script_with_6(cli: Cli, tiny_checkpoint: Path) -> None:
    result = cli("chat", "-m", tiny_checkpoint, "-n", "2", "--context", "50", stdin="word " * 80 + "\n")
    assert result.code == 6 and "the context is 50" in result.fault


class Terminal:
    """A chat in a terminal of 100 x 30: what is typed, and what the screen shows."""

    def __init__(self, *args: str, columns: int = 100, rows: int = 30) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        command, *rest = [*COMMAND, "chat", *args]
        # Answers the program's question where the cursor is, as a real terminal does.
        self.screen.write_process_input = lambda data: self.process.send(data)
        self.process = pexpect.spawn(
            command, rest, dimensions=(rows, columns), env=environment(TERM="xterm-256color"), cwd=str(ROOT), timeout=60
        )

    def type(self, text: str) -> None:
        self.process.send(text)

    @property
    def text(self) -> str:
        """All lines of the screen, without what is blank."""
        return "\n".join(line.rstrip() for line in self.screen.display).strip()

    def until(self, shows: Callable[[str], object], seconds: float = 30) -> str:
        """Feed the screen until it shows what is waited for; fail with the screen otherwise."""
        end = time.monotonic() + seconds
        while not shows(self.text):
            if time.monotonic() > end:
                pytest.fail(f"the screen never showed it:\n{self.text}")
            try:
                self._stream.feed(self.process.read_nonblocking(65536, timeout=0.2))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                if not shows(self.text):
                    pytest.fail(f"the program ended:\n{self.text}")
        return self.text

    def leave(self) -> int | None:
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus


@pytest.fixture
def terminal(tiny_checkpoint: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*args: str, **size: int) -> Terminal:
        opened.append(Terminal("-m", str(tiny_checkpoint), "-t", "0", *args, **size))
        opened[-1].until(lambda text: ">>>" in text)
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.process.close(force=True)


def test_a_conversation_in_the_terminal(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("-n", "8")
    chat.type("hello\r")
    chat.until(lambda text: text.count(">>>") == 2 and ">>> hello" in text and "tokens/s" in text)
    chat.type("/help\r")
    chat.until(lambda text: "/system [TEXT]" in text and "start a new conversation" in text)
    chat.type("/exit\r")
    assert chat.leave() == 0


def test_ctrl_c_stops_the_reply_and_the_talk_goes_on(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("-n", "500", rows=60)
    chat.type("hello\r")
    chat.until(lambda text: len(text) > 150)
    asked = time.monotonic()
    chat.type("\x03")
    chat.until(lambda text: text.count(">>>") == 2, seconds=10)
    assert time.monotonic() - asked < 3
    chat.type("/clear\r")
    chat.until(lambda text: "new conversation" in text)
    chat.type("\x04")
    assert chat.leave() == 0


def test_ctrl_c_at_an_empty_prompt_leaves_and_at_a_full_one_clears(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("-n", "4")
    chat.type("half a thought")
    chat.until(lambda text: "half a thought" in text)
    chat.type("\x03")
    chat.until(lambda text: text.count(">>>") == 2)
    chat.type("\x03")
    assert chat.leave() == 0


def test_more_lines_by_alt_enter_backslash_and_block(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("-n", "4")
    chat.type("one\x1b\rtwo\\\rthree")
    chat.until(lambda text: "three" in text and ">>> one" in text)
    assert chat.text.count(">>>") == 1
    chat.type("\r")
    chat.until(lambda text: text.count(">>>") == 2)
    chat.type('"""a\rb"""\r')
    chat.until(lambda text: text.count(">>>") == 3)


def test_forty_columns(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("-n", "30", columns=40)
    chat.type("hello\r")
    chat.until(lambda text: text.count(">>>") == 2)
    assert all(len(line) <= 40 for line in chat.text.splitlines())
