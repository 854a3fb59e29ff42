"""The REPL in a real terminal, every command and key of it. The engine is one that needs no model (tests/fake_chat)."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import stat
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dbrx_cli.repl.commands import COMMANDS
from dbrx_cli.repl.loop import HASTE_S
from dbrx_cli.repl.prompt import PLACEHOLDER
from dbrx_cli.store import Store
from tests import fake_chat
from tests.cli import SOON
from tests.terminal import Terminal

pytestmark = pytest.mark.slow  # whole runs and sessions

Open = Callable[..., Terminal]
LONG = 40  # characters of a line


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sessions and history of this file's tests, and a folder for files."""
    return tmp_path_factory.mktemp("repl")


def opened(home: Path, *flags: str, columns: int = 100, rows: int = 40, **variables: str) -> Terminal:
    terminal = Terminal(
        ["-m", "fake", *flags],
        main=fake_chat.main,
        columns=columns,
        rows=rows,
        variables={"DBRX_DATA": str(home / "data"), "DISPLAY": "", "WAYLAND_DISPLAY": "", **variables},
    )
    terminal.until(">>>", seconds=60)
    return terminal


@pytest.fixture(scope="module")
def kept(home: Path) -> Iterator[Terminal]:
    """One process for many tests."""
    editor = home / "editor.sh"
    editor.write_text(
        '#!/bin/sh\nstat -c %a "$2" > "$DBRX_DATA/mode"\n'
        'grep -q wait "$2" && echo waits && exec sleep 30\n'
        'grep -q fail "$2" && exit 3\nsed -i "s/first/edited/" "$2"\n'
    )
    editor.chmod(0o755)
    terminal = opened(home, VISUAL=f"'{editor}' --wait")
    yield terminal
    terminal.end()


@pytest.fixture
def chat(kept: Terminal) -> Terminal:
    """The kept process with a new conversation on an empty screen."""
    changed = [command for command in ("/system", "/set max_tokens") if command in kept.typed]
    kept.type("\x03")
    kept.until(lambda text: ready(kept))
    kept.typed = ""
    for command in changed:
        say(kept, f"{command} default")
    clean(kept, "/clear\r")
    return kept


def clean(chat: Terminal, line: str = "") -> None:
    """A line, if any, and Ctrl-L: an empty screen."""
    wiped = chat.received.count(b"\x1b[2J")
    chat.type(line + "\x0c")
    chat.until(lambda text: chat.received.count(b"\x1b[2J") > wiped and ready(chat))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Open]:
    """Processes of a test's own."""
    all_opened: list[Terminal] = []

    def open_one(*flags: str, **options: str) -> Terminal:
        all_opened.append(opened(tmp_path, *flags, **options))  # type: ignore[arg-type]
        return all_opened[-1]

    yield open_one
    for each in all_opened:
        each.end()


def wrapped(words: str) -> Callable[[str], bool]:
    """Whether the screen shows this, wherever its lines break: folders of tests have names of any length."""
    return lambda text: words in " ".join(text.split())


def paste(text: str) -> str:
    """As a terminal sends it."""
    return "\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~"


def enter(chat: Terminal, line: str) -> None:
    """Type a line; a long one is pasted, since the prompt takes a millisecond for a key."""
    chat.type((line if len(line) < LONG else paste(line)) + "\r")


def say(chat: Terminal, line: str, *shows: str | Callable[[str], object]) -> str:
    """Enter a line, wait for what it brings and for the next prompt."""
    prompts = prompts_of(chat)
    enter(chat, line)
    for each in shows:
        chat.until(each)
    return chat.until(lambda text: prompts_of(chat) > prompts and ready(chat))


def prompts_of(chat: Terminal) -> int:
    """How many prompts there were: each tells the terminal that it understands bracketed paste."""
    return chat.received.count(b"\x1b[?2004h")


def ready(chat: Terminal) -> bool:
    """The cursor waits behind an empty prompt, and the bottom bar is drawn."""
    row = chat.screen.display[chat.screen.cursor.y].rstrip()
    row = row.removeprefix("^C")  # echoed by the terminal where Ctrl-C came just before the prompt took it over
    return row.removesuffix(PLACEHOLDER).rstrip() == ">>>" and " tokens" in chat.text.splitlines()[-1]


def test_help_lists_every_command(chat: Terminal) -> None:
    text = say(chat, "/help", "Talk", "Keys", "leaves")
    for name in COMMANDS:
        assert re.search(rf"{re.escape(name)}\b" if name != "/?" else r"/\?", text), name
    assert "Ctrl-R" in text
    assert COMMANDS["/exit"] is COMMANDS["/quit"] is COMMANDS["/bye"]
    say(chat, "/?", "this list")


def test_an_unknown_command_gets_a_suggestion(chat: Terminal) -> None:
    say(chat, "/regne", "there is no command /regne; did you mean /regen?")
    say(chat, " /usr is a folder?", "You said:  /usr is a folder?")


def test_markdown_and_the_bottom_bar(chat: Terminal) -> None:
    text = say(chat, r"say # Head\n\nSome **bold** text.\n\n- item\n\n```py\nx = [1]\n```", "x = [1]")
    assert "**" not in text.split("x = [1]\n```")[1]
    assert "\nHead\n\nSome bold text.\n\n• item\n\n```py\nx = [1]\n```" in text
    bar = text.splitlines()[-1]
    assert re.search(r"fake +\d+/300 tokens +20\.0 tokens/s", bar)


def test_set_show_and_its_faults(chat: Terminal) -> None:
    say(chat, "/set temperature 0.25", "temperature is now 0.25")
    say(chat, "/set top-k 7", "top_k is now 7")
    say(chat, "/set top_k default", "top_k is now 0")
    say(chat, "/set seed 12", "seed is now 12")
    say(chat, "/set seed none", "seed is now none")
    say(chat, "/set stop END", 'stop is now "END"')
    say(chat, '/set stop "a b" c', 'stop is now "a b" "c"')
    say(chat, "/set stop none", "stop is now none")
    say(chat, "/set temperature=0.25", "temperature is now 0.25")
    say(chat, "/set temp 1", "there is no setting temp; did you mean temperature?")
    say(chat, "/set max_tokens 99999", "is more than the context, 300 tokens")
    say(chat, "/set", "max_tokens", "longest reply in tokens", "texts that end the reply")
    say(chat, "/set temprature 1", "there is no setting temprature; did you mean temperature?")
    say(chat, "/set temperature -1", "temperature must be 0, or 0.001-100, not -1.0")
    say(chat, "/set max_tokens many", "max_tokens must be a whole number, not many")
    say(chat, "/set top_p", "top_p is 0.95 (likeliest tokens of this total mass; 0 to 1)")
    clean(chat)
    say(chat, "/show", "temperature         0.25", "system message", "context             300 tokens")
    say(chat, "/set temperature default", "temperature is now 0.7")


def test_set_max_tokens_ends_a_reply_and_continue_goes_on(chat: Terminal) -> None:
    say(chat, "/set max_tokens 3", "max_tokens is now 3")
    say(chat, "say one two three", "one two", "the reply has reached its limit")
    say(chat, "/set max_tokens default", "max_tokens is now 1024")
    say(chat, "/continue", "going on; reads", "one two and more")
    say(chat, "prompt", "'one two and more'")
    say(chat, "/continue", "the model ended its reply, and adds nothing")


def test_continue_needs_a_reply(chat: Terminal) -> None:
    for command in ("/continue", "/regen", "/undo", "/edit", "/copy", "/export x.md", "/save"):
        say(chat, command, "dbrx: there is no")
        clean(chat)


def test_regen_says_what_it_reads(chat: Terminal) -> None:
    say(chat, "hello there", "You said: hello there")
    say(chat, "/set seed 3", "seed is now 3")
    text = say(chat, "/regen", "another reply")  # the reply was made without the seed
    assert re.search(r'another reply to "hello there"; reads 0 tokens', text)
    assert "the same" not in text and text.count("You said: hello there") == 2
    say(chat, "/regen", "the seed is 3, so the reply will be the same")
    say(chat, "/set seed none", "seed is now none")


def test_undo_takes_back_the_last_turn(chat: Terminal) -> None:
    say(chat, "say one", "one")
    say(chat, "say two", "two")
    say(chat, "/undo", 'took back "say two" and the reply; 2 messages left')
    text = say(chat, "prompt", "[('user', 'say one'), ('assistant', 'one'), ('user', 'prompt')]")
    assert "two'" not in text.split("prompt")[-1]


def test_edit_in_the_editor(chat: Terminal, home: Path) -> None:
    say(chat, "say the first", "the first")
    say(chat, "/edit", ">>> say the edited", "reads", "\nthe edited")
    assert (home / "data" / "mode").read_text().strip() == "600"
    say(chat, "/edit", "the message stays as it was")
    say(chat, "/tokens", "tokens are used by 2 messages")


def test_an_earlier_message_is_edited_as_a_branch(chat: Terminal, home: Path) -> None:
    say(chat, "/branches", "there is one branch only")
    say(chat, "say the first", "the first")
    say(chat, "say second", "second")
    say(chat, "/edit 3", "there is no message 3 of yours; /edit takes 1 to 2")
    say(chat, "/edit 1", ">>> say the edited", "this is branch 2; /branches 1 goes back")
    text = say(chat, "/branches", "*  2  2 messages")
    assert '   1  4 messages, message 1: "say the first"' in text
    clean(chat)
    say(chat, "/branches 1", "branch 1, 4 messages", ">>> say second\n\nsecond\n")
    say(chat, "/branches 3", "there is no other branch 3; there are 2; this is 1")
    with Store.open(home / "data" / "sessions.db") as store:
        session = store.latest()
        assert session is not None
        (kept,) = store.branches(session.id).values()
    assert [turn.content for turn in kept] == ["say the edited", "the edited"]
    assert [turn.content for turn in session.turns] == ["say the first", "the first", "say second", "second"]
    say(chat, "/clear", "new conversation")
    say(chat, f"/load {session.id}", "4 messages")
    say(chat, "/branches 2", "branch 2, 2 messages")
    say(chat, "prompt", "[('user', 'say the edited'), ('assistant', 'the edited'), ('user', 'prompt')]")


def test_system(chat: Terminal) -> None:
    say(chat, "/system", "(the checkpoint's default)")
    say(chat, "hello", "You said: hello")
    say(chat, "/system Be [brief].", "system message set; the next message will read 14 tokens, under a second")
    say(chat, "/system", "\nBe [brief].")
    say(chat, "prompt", "[('system', 'Be [brief].'), ('user', 'hello')")
    clean(chat)
    say(chat, "/clear", "new conversation")
    say(chat, "/system", "Be [brief].")  # a new conversation keeps it


def test_read_puts_a_file_before_the_next_message(chat: Terminal, home: Path) -> None:
    (home / "note [b].txt").write_text("line one\nline two\n")
    (home / "binary").write_bytes(b"a\xff")
    os.mkfifo(home / "pipe")
    say(chat, f"/read {home}/note [b].txt", "goes before your next message: reads 1")
    text = say(chat, "prompt of it", "You said")  # `prompt` is not its first word any more
    assert re.search(r"note \[b\].txt:\n+```\nline one\nline two\n```\n+prompt of it", text)
    clean(chat)
    say(chat, "/regen", 'another reply to "prompt of it"')  # which is what the user wrote
    clean(chat)
    say(chat, f"/read {home}/nothing", "cannot be read: No such file")
    say(chat, f"/read {home}/binary", "is not UTF-8: byte 0xff at offset 1")
    say(chat, f"/read {home}/pipe", "is not a plain file")
    say(chat, "/read", "type /read FILE")
    say(chat, "prompt", "('user', 'prompt')]")  # a file goes with one message


def test_files_that_wait_can_be_seen_and_dropped(chat: Terminal, home: Path) -> None:
    (home / "small.txt").write_text("few words\n")
    (home / "large.txt").write_text("many words " * 130)
    (home / "huge.txt").write_text("many words " * 500)
    for name in ("large", "huge"):
        say(chat, f"/read {home}/{name}.txt", "leaves no room for a question")
    say(chat, "/read", "no file waits")
    (home / "other.txt").write_text("other words\n")
    say(chat, f"/read {home}/small.txt", "goes before your next message")
    say(chat, f"/read {home}/other.txt", "goes before your next message")
    say(chat, "/tokens", "more with 2 files before your next message")
    clean(chat)
    say(chat, "/read", 'small.txt" waits for your next message: ', 'other.txt" waits')
    say(chat, "/undo", wrapped('other.txt", which waited for your next message'))
    say(chat, "word " * 300, "`/read -` drops")
    say(chat, "/read -", "dropped 1 file")
    say(chat, "prompt", "[('user', 'prompt')]")


def test_copy(chat: Terminal) -> None:
    before = len(chat.received)
    say(chat, r"say text\n\n```\ncode [x]\n```", "code [x]")
    say(chat, "/copy", "asked the terminal to copy")
    say(chat, "/copy code", "copy 9 characters (OSC 52")
    copied = [
        base64.b64decode(data).decode() for data in re.findall(rb"\x1b\]52;c;([^\x07]*)\x07", chat.received[before:])
    ]
    assert copied == ["text\n\n```\ncode [x]\n```", "code [x]\n"]


def test_save_load_sessions_and_export(chat: Terminal, home: Path) -> None:
    say(chat, "say kept words", "kept words")
    say(chat, "/save my talk", 'is saved as "my talk"')
    say(chat, "/save 'our talk'", '"my talk" is now called "our talk"')
    say(chat, "/save my talk", '"our talk" is now called "my talk"')
    say(chat, "/clear", "new conversation")
    say(chat, "say other", "other")
    text = say(chat, "/sessions", "my talk: say kept words")
    assert re.search(r"^\* +\d+ +\d{4}-\d\d-\d\d \d\d:\d\d +say other$", text, re.MULTILINE)
    say(chat, "/load my tlk", "there is no session 'my tlk'; did you mean my talk?")
    say(
        chat,
        "/load my talk",
        "session my talk, 2 messages; the next message reads",
        ">>> say kept words\n\nkept words\n",
    )
    clean(chat)
    say(chat, "prompt", "[('user', 'say kept words'), ('assistant', 'kept words'), ('user', 'prompt')]")
    for name in ("talk.md", "talk.json"):
        say(chat, f"/export {home}/{name}", f"4 messages written to {home}/{name}")
        say(chat, f"/export {home}/{name}", "is there already", wrapped("to write over it: /export !"))
        say(chat, f"/export !{home}/{name}", "4 messages written")
        clean(chat)
    assert "# my talk" in (home / "talk.md").read_text() and "kept words" in (home / "talk.md").read_text()
    assert [m["role"] for m in json.loads((home / "talk.json").read_text())["messages"]] == ["user", "assistant"] * 2
    say(chat, f"/export {home}/talk.doc", "ends with .md or .json")


def test_tokens_and_stats(chat: Terminal) -> None:
    say(chat, "say one two", "one two")
    say(chat, "/tokens", "11 of 300 tokens are used by 2 messages", "not in the cache, and read with the next message")
    say(chat, "say three", "three")
    say(
        chat,
        "/stats",
        lambda text: re.search(r"last reply +prompt", text),
        lambda text: re.search(r"replies +read", text),
        "was loaded in 1.5 s",
    )


def test_a_full_context_says_which_messages_go(chat: Terminal) -> None:
    say(chat, "/system keep me", "system message set")
    for i in range(3):
        say(chat, f"say {i} " + "word " * 25, f"{i} word")
    text = say(chat, "prompt " + "more " * 40, "the context is full")
    assert 'dbrx: - user: "say 0 word word' in text and 'dbrx: - assistant: "0 word word' in text
    flat = " ".join(text.split())
    assert "[('system', 'keep me'), ('user', 'say 1" in flat or "[('system', 'keep me'), ('user', 'say 2" in flat
    say(chat, "/tokens", "are no longer read")
    say(chat, "word " * 300, "the context is 300; shorten it")


def test_multiline_switches_what_enter_does(chat: Terminal) -> None:
    say(chat, "/multiline", "Enter makes a new line, Alt-Enter sends")
    chat.type("say a\rb\x1b\r")
    chat.until("... b\n\na\nb")
    chat.until(lambda text: ready(chat) and "Alt-Enter sends" in text.splitlines()[-1])
    say(chat, "/multiline", "Enter sends")


def test_more_lines_by_alt_enter_backslash_and_block(chat: Terminal) -> None:
    for typed in ("say a\x1b\rb\r", "say a\\\rb\r", '"""say a\rb"""\r'):
        chat.type(typed)
        text = chat.until(lambda text: "b\n\na\nb\n" in text.replace('"""', "") and ready(chat))
        assert "\\" not in text
        clean(chat)


def test_a_backslash_at_the_end_can_be_sent(chat: Terminal) -> None:
    """A typed one opens a line; a space behind it, three quotes or a paste send it (`PASTES` has the last)."""
    for typed in ("say C:\\dir\\ ", '"""say C:\\dir\\"""'):
        say(chat, typed, "\nC:\\dir\\\n")
        clean(chat)


def test_a_block_that_begins_with_a_slash_is_a_message(chat: Terminal) -> None:
    say(chat, '"""/help"""', "You said: /help")


def test_completion(chat: Terminal, home: Path) -> None:
    (home / "finished story.txt").write_text("x")
    for typed, whole in (
        ("/und", "/undo"),
        ("/set temp", "/set temperature"),
        (f"/read {home}/finished", f"/read {home}/finished story.txt"),
        ("/set markdown of", "/set markdown off"),
    ):
        chat.type(typed)
        chat.until(re.split("[ /]", whole)[-1])  # in the menu
        chat.type("\t")
        chat.until(f">>> {whole}")
        chat.type("\x03")
        chat.until(lambda text: ready(chat))
    say(chat, "say x", "x")
    say(chat, "/save completed", "saved")
    chat.type("/load compl")
    chat.until("completed  say x")
    chat.type("\t")
    chat.until(">>> /load completed")
    chat.type("\x03")
    chat.type("/re")
    chat.until("another reply to your last message")  # the menu, with explanations
    chat.type("\x03")


def test_history_and_reverse_search(chat: Terminal) -> None:
    say(chat, "say a needle in hay", "a needle in hay")
    say(chat, "say more hay", "more hay")
    chat.type("\x1b[A\x1b[A")
    chat.until(">>> say a needle in hay\n\n")
    chat.type("\x03")
    chat.until(lambda text: ready(chat))
    chat.type("\x12needle")
    chat.until("I-search backward: needle")
    chat.type("\r")
    chat.until(lambda text: ">>> say a needle in hay\n\n" in text)
    chat.type("\x03")


def test_ctrl_c_stops_a_reply_and_keeps_what_came(chat: Terminal) -> None:
    enter(chat, "slowly " + "word " * 100)
    chat.until("word word word word word")
    chat.until(lambda text: text.count("word ") > 105)
    asked = time.monotonic()
    chat.type("\x03\x03\x03")
    chat.until("stopped; /continue goes on")
    assert time.monotonic() - asked < SOON
    chat.until(lambda text: ready(chat))
    text = say(chat, "/tokens", "used by 2 messages")
    assert "^C" not in text


def test_ctrl_c_while_the_prompt_is_read(chat: Terminal) -> None:
    chat.type("read 30\r")
    chat.until(lambda text: re.search(r"\n\nreading, \d+ s; Ctrl-C stops$", text))
    asked = time.monotonic()
    chat.type("\x03")
    chat.until("stopped before the reply began")
    assert time.monotonic() - asked < SOON
    say(chat, "prompt", "[('user', 'prompt')]")  # the question is taken back, and the talk goes on
    chat.type("\x1b[A\x1b[A")
    chat.until(">>> read 30")


def test_what_is_typed_during_a_reply_waits(chat: Terminal) -> None:
    chat.type("slowly one two three four five six seven\r")
    chat.until("one two")
    chat.type("next thing")
    text = chat.until(">>> next thing")
    assert "one two three four five six seven\n" in text


def test_the_editor_brings_the_text_back_unsent(chat: Terminal, home: Path) -> None:
    before = asked(chat, home)
    for draft, shows in (
        ("say the first", ">>> say the edited"),
        ("say the same", ">>> say the same"),
        ("say it fails", "changed\n>>> say it fails"),
        ("say it waits", "changed\n>>> say it waits"),
    ):
        opened = home / "data" / "mode"
        opened.unlink(missing_ok=True)
        chat.type(draft + "\x18\x05")
        while not opened.exists():  # what is expected may stand on the screen before the editor has it
            time.sleep(0.02)
        time.sleep(0.2)
        if "waits" in draft:
            chat.until("\nwaits")
            chat.type("\x03")
            chat.until("^C\ndbrx: the editor")
            chat.until(wrapped("was stopped by Ctrl-C;"))
        chat.until(lambda text, shows=shows: shows in text and " tokens" in text.splitlines()[-1])
        assert asked(chat, home) == before
        chat.type("\x15")
        chat.until(lambda text: ready(chat))
    chat.type("say the first\x18\x05")
    chat.until(">>> say the edited")
    say(chat, "", "\nthe edited")


def test_an_edited_message_comes_again(chat: Terminal) -> None:
    say(chat, "say the first", "the first")
    say(chat, "/edit", "\nthe edited")
    chat.type("\x1b[A")
    chat.until(">>> say the edited\n\n")
    chat.type("\x03")


PASTES = {
    "backslashes": "Explain:\ndocker run \\\n  -p 80:80 \\\n  nginx\\",
    "docstring": '"""Module docs."""\nimport os\n\ndef f():\n    return 1',
    "open docstring": '"""Module that is open\ndocs',
    "one docstring": '"""Docs."""',
    "block in it": 'def f():\n    """Doc."""\n"""',
    "slash": "/etc/hosts holds\n127.0.0.1\tlocalhost",
    "command of lines": "/clear\nis a command",
    "slash and quotes": '/etc/x holds\n""" only',
    "quotes and slash": '"""one\n/two """ and """ three',
    "lines": "".join(f"line {i} {'é你🙂' * 9}\n" for i in range(5)),
}


def asked(chat: Terminal, home: Path) -> list[str]:
    """The user's messages, as the session holds them."""
    with Store.open(home / "data" / "sessions.db") as store:
        session = store.latest()
    return [turn.content for turn in session.turns if turn.role == "user"] if session else []


@pytest.mark.parametrize("text", PASTES.values(), ids=PASTES)
def test_a_paste_is_one_message_as_it_is(chat: Terminal, home: Path, text: str) -> None:
    chat.type(paste(text.replace("\n", "\r\n" if "slash" in text else "\n")))
    say(chat, "", "You said")
    assert asked(chat, home) == [text]
    chat.type("\x1b[A")
    say(chat, "", "You said")  # again from the history
    assert [each.strip("\n") for each in asked(chat, home)] == [text.strip("\n")] * 2


def test_a_pasted_command_is_obeyed_and_typed_lines_stay_as_they_were(chat: Terminal, home: Path) -> None:
    chat.type(paste("/set temperature 0.5"))
    say(chat, "", "temperature is now 0.5")
    chat.type("first\\\r" + paste("a \\\nb") + "\r")
    chat.until("You said: first")
    chat.until(lambda text: ready(chat))
    assert asked(chat, home) == ["first\na \\\nb"]


def test_a_paste_during_a_reply_waits_unsent(chat: Terminal, home: Path) -> None:
    text = "".join(f"line {i}{'你🙂' * 40}\n" for i in range(50)) + "x" * 6000 + "\nthe end"
    chat.type("slowly one two three four five six seven eight\r")
    chat.until("one two")
    chat.type(paste(text))
    chat.until(lambda shown: re.search(r">>> \[52 lines, \d+ tokens\]$", shown, re.MULTILINE))
    assert asked(chat, home) == ["slowly one two three four five six seven eight"]
    chat.type("\x1b[H\x1b[F, and?")
    say(chat, "", "\nthe end, and?\n\n>>>")
    text += ", and?"
    assert asked(chat, home)[1:] == [text]


def test_a_file_that_is_dropped_on_the_window_is_read(chat: Terminal, home: Path) -> None:
    (home / "a note.txt").write_text("noted\n")
    (home / "sea.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for pasted in (f"'{home}/a note.txt' ", f"{home}/a\\ note.txt", f"file://{home}/a%20note.txt"):
        chat.type(f"\x1b[200~{pasted}\x1b[201~")
        say(chat, "", wrapped('a note.txt" goes before your next message'))
        say(chat, "/undo", "took back")
        clean(chat)
    say(chat, f"/read '{home}/sea.png'", wrapped("sea.png is an image, and this model reads text only"))


def test_a_slow_paste_across_the_end_of_a_reply_holds_no_report(chat: Terminal, home: Path) -> None:
    chat.type("slowly one two three four\r")
    chat.until("one two")
    whole = paste("first\nsecond")
    chat.type(whole[:12])
    shown = prompts_of(chat)
    chat.until(lambda text: prompts_of(chat) > shown)  # the prompt has asked where the cursor is
    time.sleep(0.1)
    chat.type(whole[12:])
    chat.until("... second")
    chat.until(lambda text: " tokens" in text.splitlines()[-1])
    say(chat, "", "You said: first")
    assert asked(chat, home)[1:] == ["first\nsecond"]


@pytest.mark.parametrize(
    "queued", ["next\rand next\rhalf", paste("a\nb\n") + "\r", paste("long " * 50_000), "\x1b[200~a\r"]
)
def test_ctrl_c_drops_what_waits(chat: Terminal, home: Path, queued: str) -> None:
    enter(chat, "slowly " + "word " * 60)
    chat.until(lambda text: text.count("word ") > 65)
    chat.type(queued)
    chat.until(lambda text: text.count("word ") > 70)
    stopped = time.monotonic()
    chat.type("\x03")
    chat.until("stopped; /continue goes on")
    assert time.monotonic() - stopped < SOON
    if "201" not in queued and "200" in queued:
        chat.type("b\rc\x1b[201~")  # the rest of a paste is not taken for lines
        chat.until("... c")
        chat.type("\x03")
    chat.until(lambda text: ready(chat))
    say(chat, "say typed behind", "typed behind")
    assert len(asked(chat, home)) == 2


def test_typed_lines_wait_and_ctrl_c_drops_the_rest_of_them(chat: Terminal, home: Path) -> None:
    chat.type("slowly one two three four\r")
    chat.until("one two")
    chat.type("slowly " + "more " * 50 + "\rsay never\r")
    chat.until(lambda text: text.count("more ") > 60)
    chat.type("\x03say then\r")
    chat.until("\nthen")
    chat.until(lambda text: ready(chat))
    assert [text.split()[1] for text in asked(chat, home)] == ["one", "more", "then"]


def test_a_fault_amid_a_reply_keeps_what_came(chat: Terminal, home: Path) -> None:
    text = say(chat, "fail some words", "what came of the reply is kept")
    assert "\nsome words\n" in text and "\ndbrx: the server broke off" in text
    say(chat, "prompt", "[('user', 'fail some words'), ('assistant', 'some words'), ('user', 'prompt')]")
    with Store.open(home / "data" / "sessions.db") as store:
        session = store.latest()
    assert session and session.timings[1] == {"finish_reason": "interrupted"}


def test_markdown_can_be_switched_off(chat: Terminal) -> None:
    say(chat, "/set markdown off", "markdown is now off")
    say(chat, r"say **as it is**", "\n**as it is**")
    say(chat, "/set markdown on", "markdown is now on")


def test_a_hostile_reply_is_not_obeyed(chat: Terminal) -> None:
    before = len(chat.received)
    say(chat, r"say \e]0;owned\a\e]52;c;aGk=\a\e[?25lplain &#13;&#27; text", "plain")
    say(chat, "/regen", "another reply to")
    assert b"owned\x07" not in chat.received[before:] and b"\x1b]52" not in chat.received[before:]
    assert chat.screen.title == "" and not chat.screen.cursor.hidden


def test_files_are_private(kept: Terminal, home: Path) -> None:
    for path in (home / "data").iterdir():
        if path.name != "mode":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_what_is_pasted_while_the_model_loads_waits_unsent(tmp_path: Path) -> None:
    chat = Terminal(
        ["-m", "fake"],
        main=fake_chat.main,
        variables={"DBRX_DATA": str(tmp_path / "data"), "FAKE_LOAD": "0.5"},
    )
    chat.until("Reading the weights")
    chat.type("say typed\r" + paste("one\\\ntwo\n") + "!")
    chat.until("\ntyped\n")
    chat.until("... two\n... !")
    chat.type("\r")
    chat.until("You said: one")
    chat.until(lambda text: ready(chat))
    chat.type("\x04")
    assert chat.leave() == 0
    assert asked(chat, tmp_path) == ["say typed", "one\\\ntwo\n!"]
    assert (
        (chat.process.before or b"").endswith(b"\x1b[?2004l")
        and chat.flags & termios.ICANON
        and chat.flags & termios.ISIG
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads_restores_the_terminal(tmp_path: Path, number: signal.Signals) -> None:
    chat = Terminal(
        ["-m", "fake"],
        main=fake_chat.main,
        variables={"DBRX_DATA": str(tmp_path / "data"), "FAKE_LOAD": "30"},
    )
    chat.until("Reading the weights")
    if number == signal.SIGINT:
        chat.type("\x03")
    else:
        os.kill(chat.process.pid, number)
    assert chat.leave() == 128 + number
    assert (
        chat.flags & termios.ECHO
        and chat.flags & termios.ISIG
        and b"\x1b[?2004l" in chat.received + chat.process.before
    )


def test_ctrl_c_twice_at_the_prompt_leaves(start: Open) -> None:
    chat = start()
    chat.type("half a thought")
    chat.until("half a thought")
    chat.type("\x03")
    chat.until(lambda text: ready(chat))
    chat.type("\x03")
    chat.until("Ctrl-C again leaves")
    chat.until(lambda text: ready(chat))
    time.sleep(HASTE_S)  # sooner, it would be the same wish
    chat.type("\x03")
    assert chat.leave() == 0


def test_ctrl_c_after_a_stopped_reply_leaves(start: Open) -> None:
    chat = start()
    chat.type("slowly a b c d e f g h i j k l m n o p q r s t u v w x y z\r")
    chat.until("\na b c")
    chat.type("\x03")
    chat.until("Ctrl-C again leaves")
    chat.until(lambda text: ready(chat))
    time.sleep(2 * HASTE_S)  # at once it would be the same wish
    chat.type("\x03")
    assert chat.leave() == 0


@pytest.mark.parametrize(
    "number, moment",
    [
        (signal.SIGTERM, "prompt"),
        (signal.SIGHUP, "reply"),
        (signal.SIGTERM, "reading"),
        (signal.SIGTERM, "reply"),
        (signal.SIGHUP, "prompt"),
        (signal.SIGHUP, "reading"),
    ],
)
def test_a_signal_saves_and_restores_the_terminal(
    start: Open, tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    chat = start()
    say(chat, "say whole turn", "whole turn")
    if moment == "reply":
        enter(chat, "slowly " + "partial " * 100)
        chat.until(lambda text: text.count("partial") > 105)
    elif moment == "reading":
        chat.type("read 30\r")
        time.sleep(0.3)
    sent = time.monotonic()
    os.kill(chat.process.pid, number)
    code = chat.leave()
    assert time.monotonic() - sent < SOON
    assert code == 128 + number
    assert chat.flags & termios.ECHO and chat.flags & termios.ICANON
    with Store.open(tmp_path / "data" / "sessions.db") as store:
        session = store.latest()
    assert session is not None
    turns = [(turn.role, turn.content) for turn in session.turns]
    assert turns[:2] == [("user", "say whole turn"), ("assistant", "whole turn")]
    if moment == "reply":
        assert turns[3][1].startswith("partial ")
    else:
        assert len(turns) == 2


def test_hangup_with_the_terminal_there_leaves_pastes_unmarked(start: Open) -> None:
    chat = start("--no-log")
    enter(chat, "slowly " + "partial " * 100)
    chat.until(lambda text: text.count("partial") > 105)
    os.kill(chat.process.pid, signal.SIGHUP)
    assert chat.leave() == 128 + signal.SIGHUP
    sent = chat.received + chat.process.before
    assert sent.rfind(b"\x1b[?2004l") > sent.rfind(b"\x1b[?2004h")


def starter() -> None:
    """Starts the chat as a shell does, and restores nothing when it stops or ends."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    sys.stdin.readline()  # the test looks at the terminal before
    pid = os.fork()
    os.setpgid(pid, pid)  # in both, as shells do: whichever comes first
    os.tcsetpgrp(0, pid or os.getpid())
    if not pid:
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        fake_chat.main()
    print("pid", pid, flush=True)
    print("it is", "stopped" if os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]) else "ended", flush=True)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("key, end", [("\x1a", "stopped"), ("\x1c", "ended")])
def test_keys_that_stop_or_end_the_program_amid_a_reply_restore_the_terminal(
    request: pytest.FixtureRequest, tmp_path: Path, key: str, end: str
) -> None:
    """No shell, which would restore it by itself."""
    chat = Terminal(["--no-log"], main=starter, variables={"DBRX_DATA": str(tmp_path)})
    request.addfinalizer(chat.end)
    before = termios.tcgetattr(chat.process.fileno())
    chat.type("\n")
    pid = int(re.findall(r"pid (\d+)", chat.until(">>>"))[0])
    enter(chat, "slowly " + "word " * 40)
    chat.until(lambda text: text.count("word ") > 45)
    during = termios.tcgetattr(chat.process.fileno())
    assert during != before
    chat.type(key)
    chat.until(f"it is {end}")
    assert termios.tcgetattr(chat.process.fileno()) == before
    assert chat.received.rfind(b"\x1b[?2004l") > chat.received.rfind(b"\x1b[?2004h")
    if end == "stopped":
        os.kill(pid, signal.SIGCONT)
        shown = chat.text.count("word ")
        chat.until(lambda text: text.count("word ") > shown + 8)
        assert termios.tcgetattr(chat.process.fileno()) == during
        assert chat.received.rfind(b"\x1b[?2004h") > chat.received.rfind(b"\x1b[?2004l")


def test_a_killed_chat_keeps_the_question_from_the_first_text_on(start: Open, tmp_path: Path) -> None:
    chat = start()
    chat.type("slowly one two three four\r")
    chat.until("\none")
    os.kill(chat.process.pid, signal.SIGKILL)
    assert chat.leave() == -signal.SIGKILL
    assert asked(chat, tmp_path) == ["slowly one two three four"]


def test_a_terminal_that_goes_away_takes_nothing_along(start: Open, tmp_path: Path) -> None:
    chat = start()
    enter(chat, "slowly " + "partial " * 100)
    chat.until(lambda text: text.count("partial") > 105)
    chat.process.ptyproc.delayafterclose = 1.5
    chat.process.close()  # the window is closed: SIGHUP, and every write is a fault
    assert chat.process.exitstatus == 128 + signal.SIGHUP
    with Store.open(tmp_path / "data" / "sessions.db") as store:
        session = store.latest()
    assert session is not None and session.turns[1].content.startswith("partial ")


def test_the_session_goes_on_later(start: Open, tmp_path: Path) -> None:
    chat = start("--session", "mine")
    say(chat, "say remembered", "remembered")
    chat.type("/bye\r")
    assert chat.leave() == 0
    assert "kept as session 1; to go on: dbrx chat -m fake -c" in chat.text
    for flags in (["-c"], ["--session", "1"]):
        chat = start(*flags)
        chat.until("session mine")
        assert chat.text.index("/help lists more") < chat.text.index("session mine") < chat.text.index(">>> say")
        say(chat, "prompt", "('assistant', 'remembered')")
        say(chat, "/undo", "took back")
        chat.type("\x04")
        assert chat.leave() == 0


def test_history_outlives_the_program(start: Open, tmp_path: Path) -> None:
    chat = start()
    chat.process.send(b"say \xff\xc3\xa9 odd\r")
    chat.until("odd\n")
    chat.until(lambda text: ready(chat))
    chat.type("\x04")
    assert chat.leave() == 0
    chat = start()
    chat.type("\x1b[A")
    chat.until("é odd")
    assert stat.S_IMODE((tmp_path / "data" / "history").stat().st_mode) == 0o600


def test_a_planted_link_takes_no_history(start: Open, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    target = tmp_path / "target"
    (tmp_path / "data" / "history").symlink_to(target)
    chat = start()
    chat.until("what you type is not kept")
    say(chat, "hello", "You said: hello")
    assert not target.exists()


def test_forty_columns(start: Open) -> None:
    chat = start(columns=40, rows=30)
    say(chat, "say " + "some words " * 8 + r"\n\n- " + "an item " * 9, "an item")
    bar = chat.text.splitlines()[-1]
    assert re.search(r"fake +\d+/300 tokens +20\.0 tokens/s", bar)
    say(chat, "/help", "leave")
    assert all(re.search(r"\S", line) is None or len(line) <= 40 for line in chat.transcript.splitlines())
    assert "    go on with the last reply" in chat.transcript
    assert "Ctrl-D leaves" in " ".join(chat.transcript.split()) and "/help" in chat.transcript
    say(chat, "/show", "temperature         0.7\n", "system message\n    the checkpoint's default\n")
    clean(chat)
    say(chat, "/tokens", "read with the\nnext message: ")


def test_the_window_changes_its_size(start: Open) -> None:
    chat = start(columns=80)
    enter(chat, "slowly " + "word " * 20 + r"\n\nthe end")
    chat.until("word word word")
    chat.resize(50, 30)
    chat.until("the end\n")
    chat.until(lambda text: ready(chat))
    assert "fake" in chat.text.splitlines()[-1]


def test_no_color(start: Open) -> None:
    chat = start(NO_COLOR="1")
    say(chat, r"say **b** `c`\n\n```py\ndef f(): pass\n```", "def f")
    assert not re.search(rb"\x1b\[[\d;]*\b(3[0-8]|4[0-8]|9[0-7])[;m]", chat.received)
    assert "**" not in chat.text.split("```\n")[1]


@pytest.mark.parametrize("flags, variables", [((), {"TERM": "dumb"}), (("--plain",), {})])
def test_a_dumb_terminal(start: Open, flags: tuple[str, ...], variables: dict[str, str]) -> None:
    chat = start(*flags, **variables)
    chat.type("say **b**\r")
    chat.until("dbrx: reading; Ctrl-C stops\n**b**\n\n>>>")
    chat.type("\x04")
    assert chat.leave() == 0
    assert "\n>>>\ndbrx: kept as session 1" in chat.transcript.replace(">>> \n", ">>>\n")
    assert b"\x1b" not in chat.received


def test_sessions_that_cannot_be_written_do_not_end_the_talk(start: Open, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where a folder should be")
    chat = start()
    say(chat, "hello", "You said: hello", "this conversation is not being saved")
    say(chat, "again", "You said: again")
