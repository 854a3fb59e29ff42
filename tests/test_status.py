"""The line that says what is waited for: what it tells, when it comes, and that it leaves nothing behind."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from dbrx_cli import output, status
from dbrx_cli.commands import generate
from dbrx_cli.conversation import Conversation
from dbrx_cli.engine import Delta, Done, Request
from dbrx_cli.options import OutputOptions
from dbrx_cli.repl import editor, loop
from dbrx_cli.repl.lines import Line
from dbrx_cli.repl.loop import Repl
from dbrx_cli.repl.signals import Signals
from dbrx_cli.repl.typeahead import Typeahead
from dbrx_cli.report import Report
from dbrx_cli.session_cache import keep_cache
from dbrx_cli.status import Status
from dbrx_cli.store import Recorder, Store
from model.errors import InputError
from model.messages import Message
from model.sampling import SamplingParams
from tests.cli import Cli
from tests.fake_chat import FakeEngine
from tests.terminal import Screen, Terminal, feed


class Tty(io.StringIO):
    """A terminal, as far as a program asks."""

    def isatty(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


def terminal(monkeypatch: pytest.MonkeyPatch) -> Tty:
    """stderr as a terminal, and a line that does not tick by itself. No fixture: pytest has its own stderr by then."""
    monkeypatch.setattr(sys, "stderr", made := Tty())
    monkeypatch.setattr(status, "TICK_S", 1e9)
    monkeypatch.setenv("TERM", "xterm")
    return made


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "seconds, read, width, shows",
    [
        (0, None, 80, "reading; Ctrl-C stops"),
        (3, None, 80, "reading, 3 s; Ctrl-C stops"),
        (0, (0, 1126), 80, "reading 0 of 1,126 tokens, 11 s left; Ctrl-C stops"),  # at the speed of the last reply
        (4, (0, 1126), 80, "reading 0 of 1,126 tokens, 7 s left; Ctrl-C stops"),
        (4, (512, 1126), 80, "reading 512 of 1,126 tokens, 5 s left; Ctrl-C stops"),  # at its own: 128 a second
        (4, (512, 1126), 48, "512/1,126 tokens, 5 s left; Ctrl-C stops"),
        (4, (512, 1126), 39, "512/1,126, 5 s left; Ctrl-C stops"),
        (4, (512, 1126), 20, "512/1,126, 5 s left"),
        (4, (512, 1126), 5, "512/1"),
    ],
)
def test_what_it_tells(
    monkeypatch: pytest.MonkeyPatch, seconds: int, read: tuple[int, int] | None, width: int, shows: str
) -> None:
    terminal(monkeypatch)
    clock = Clock()
    monkeypatch.setattr(status, "time", clock)
    with Status("reading", speed=100.0) as line:
        line.read(0, read[1]) if read else None
        clock.now += seconds
        if read:
            line.read(*read) if read[0] else None
        assert line.text(width) == shows


def test_what_is_printed_meanwhile_stands_above_it_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    err = terminal(monkeypatch)
    screen = Screen(60, 10)
    with Status("starting demo"):
        output.tell("dbrx: a notice")
        feed(screen, err.getvalue())
        assert [row.rstrip() for row in screen.display[:2]] == ["dbrx: a notice", "starting demo; Ctrl-C stops"]
        err.truncate(0)
        err.seek(0)
    output.tell("then")
    feed(screen, err.getvalue())
    assert [row.rstrip() for row in screen.display[:3]] == ["dbrx: a notice", "then", ""]


def test_a_ctrl_c_in_a_narrow_window_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal shows it as ^C behind the line, which may not reach the next row: only one is wiped."""
    err = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "40")
    with Status(f"starting /models/{'deep/' * 9}weights"):
        err.write("^C")
    feed(screen := Screen(40, 10), err.getvalue())
    assert [row for row in screen.display if row.strip()] == []


@pytest.mark.parametrize("columns", [40, 60])
def test_a_ctrl_c_beside_a_bar_leaves_nothing(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    err = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(columns))
    with Report(OutputOptions()).bar("Reading the weights") as advance:
        advance(200_000_000, 2_600_000_000)
        err.write("^C")
    feed(screen := Screen(columns, 10), err.getvalue())
    assert [row for row in screen.display if row.strip()] == []


def test_no_thread_shows_a_line_behind_the_last_word() -> None:
    def shows() -> None:
        while True:
            output.place("starting demo")

    def ends() -> None:
        threading.Thread(target=shows, daemon=True).start()
        time.sleep(0.05)
        output.restore(last=True)
        time.sleep(0.05)
        os._exit(0)

    child = Terminal([], main=ends)
    assert child.leave() == 0 and b"starting demo" in (child.process.before or b"") and child.text == ""


def test_a_notice_breaks_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than a row the terminal breaks, so that it can be copied whole."""
    err = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "40")
    path = f"/models/{'deep/' * 9}weights"
    output.tell(f"dbrx: the weights become int8 as they are read from {path}")
    assert err.getvalue() == f"dbrx: the weights become int8 as they\n  are read from\n  {path}\n"
    monkeypatch.setattr(sys, "stderr", piped := io.StringIO())
    output.tell("word " * 20)
    assert piped.getvalue() == "word " * 20 + "\n"


@pytest.mark.parametrize("variable, value", [("TERM", "dumb"), ("DBRX_PLAIN", "1")])
def test_without_a_cursor_that_moves_it_is_one_line(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    err = terminal(monkeypatch)
    monkeypatch.setenv(variable, value)
    with Status("reading") as line:
        line.read(0, 100)
        line.read(100, 100)
    assert err.getvalue() == "dbrx: reading; Ctrl-C stops\n"


class Slow(FakeEngine):
    """Notes what the terminal had been shown when it began, and between reading and text."""

    seen: list[str]

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        assert request.on_read is not None and isinstance(sys.stderr, Tty)
        self.seen = [sys.stderr.getvalue()]
        request.on_read(0, 3000)
        request.on_read(512, 3000)
        self.seen.append(sys.stderr.getvalue())
        yield from super().stream(request)


@pytest.mark.parametrize("flags", [(), ("--json",), ("--no-stream",), ("-x",)])
def test_generate_shows_it_before_the_engine_begins_and_until_there_is_text(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    err = terminal(monkeypatch)
    engine = Slow()
    monkeypatch.setattr(generate, "open_engine", lambda options, report: engine)
    out = Tty()
    monkeypatch.setattr(sys, "stdout", out)
    cli("generate", "-m", "fake", "--no-log", *flags, r"say some text\n```\ncode\n```")
    assert "reading the prompt" in engine.seen[0] and "reading 512 of 3,000 tokens" in engine.seen[1]
    assert err.getvalue().endswith("\r\x1b[K")
    assert "code" in out.getvalue() and ("some text" in out.getvalue()) == ("-x" not in flags)


def test_nothing_of_it_goes_into_a_file(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "open_engine", lambda options, report: FakeEngine())
    result = cli("generate", "-m", "fake", "--no-log", "say text")
    assert (result.out, result.err) == ("text\n", "")


class Watched(Tty):
    """Notes the processor's time of its first text."""

    first: float | None = None

    def write(self, text: str) -> int:
        self.first = self.first or time.process_time()
        return super().write(text)


class Late(FakeEngine):
    """Computes nothing before the terminal has been shown something, and keeps a cache as a model does."""

    context = 100_000
    cache = 0  # times that one was loaded

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        after_a_sign()
        yield from super().stream(request)

    def load_cache(self, path: Path) -> None:
        after_a_sign()
        self.cache += 1

    def save_cache(self, path: Path) -> None:
        after_a_sign()


def after_a_sign() -> None:
    assert isinstance(sys.stderr, Watched) and sys.stderr.first is not None


def late_chat(recorder: Recorder) -> Repl:
    """A chat on a terminal with that engine."""
    repl = Repl(
        Late(), Conversation(), SamplingParams(max_tokens=50), (), Report(OutputOptions()), recorder, Signals(),
        Typeahead(), name="fake", asked="fake", markdown=False,
    )  # fmt: skip
    repl.interactive = True
    return repl


def test_the_first_sign_of_life_comes_before_the_engine_and_within_a_tenth_of_a_second(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    terminal(monkeypatch)
    repl = late_chat(Recorder("chat", "fake", None, {}, print, path=tmp_path / "sessions.db"))
    monkeypatch.setattr(Repl, "reader", SimpleNamespace(remember=print))  # of no use to /edit
    monkeypatch.setattr(editor, "edit_text", lambda text: f"{text}, changed")
    pasted = "".join(f"line {i} of what was pasted\n" for i in range(3000))
    asks = ("say one", pasted, "/regen", "say two", "/set max_tokens 1", "say one two", "/continue")
    for line in (*asks, "/edit", "/edit 1", "/branches 1", "/undo", "/clear", "/load 1"):
        monkeypatch.setattr(sys, "stderr", err := Watched())
        entered = time.process_time()
        repl.obey(Line(line, line.startswith("/")))
        assert err.first is not None and err.first - entered < 0.1, line
    monkeypatch.setattr(sys, "stderr", Watched())
    keep_cache(repl.engine, repl.recorder, repl.report)
    assert cast(Late, repl.engine).cache == 1


SEEN = "what takes its time"
WAITS = (
    ("dbrx_cli.planning.Question.of", "plan fake"),
    ("dbrx_cli.engine.load.find_model", "bench fake"),
    ("dbrx_cli.engine.load.find_model", "quantize fake out --to int8"),
    ("dbrx_cli.engine.load.find_model", "convert fake out"),
    ("dbrx_cli.engine.load.find_model", "export out.gguf -m fake"),
    ("dbrx_cli.engine.local.LocalEngine.load", "trace -m fake hi"),
    ("dbrx_cli.addresses.listen", "serve -m fake"),
    ("model.hub.download", "download fake/fake"),
    ("model.hub.plan_download", "download fake/fake --dry-run"),
    ("dbrx_cli.doctor.examine", "doctor"),
    ("dbrx_cli.engine.load.find_model", "generate -m fake --batch BATCH"),
    ("dbrx_cli.engine.remote.RemoteEngine.open", "generate --url http://127.0.0.1:9 hi"),
)


@pytest.mark.parametrize("work, command", WAITS, ids=[command for _, command in WAITS])
def test_every_command_that_waits_shows_something_first(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, work: str, command: str
) -> None:
    """Before its work begins; a fault there leaves nothing of it."""

    def begins(*args: object, **named: object) -> None:
        after_a_sign()
        raise InputError(SEEN)

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    terminal(monkeypatch)
    monkeypatch.setattr(work, begins)
    monkeypatch.setattr(sys, "stderr", err := Watched())
    cli(*command.replace("BATCH", str(tmp_path / "prompts.jsonl")).split())
    assert err.getvalue().endswith(f"\r\x1b[Kdbrx: {SEEN}\n") and "Ctrl-C stops" in err.getvalue()


@pytest.mark.parametrize(
    "args, signs",
    [
        (("chat", "-c"), ("starting fake", "fake, 100,000 tokens of context", "fetching what was read")),
        (("chat", "--session", "1"), ("starting fake", "fake, 100,000 tokens of context", "fetching what was read")),
        (("generate", "say one"), ("starting fake", "reading the prompt")),
    ],
)
def test_nothing_is_loaded_or_fetched_before_it_is_said(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], signs: tuple[str, ...]
) -> None:
    """From the command on: `signs` come in this order."""
    with Store.open() as store:
        store.save(store.begin("chat", "fake", None, {}), None, [Message("user", "hi"), Message("assistant", "ho")])

    def load(options: object, report: object) -> Late:
        after_a_sign()
        return Late()

    terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "dbrx_cli.engine.local", SimpleNamespace(LocalEngine=SimpleNamespace(load=load)))
    monkeypatch.setattr(loop, "sys", SimpleNamespace(stdin=Tty(), stdout=Tty()))
    monkeypatch.setattr(Repl, "_loop", lambda self: None)
    monkeypatch.setattr(sys, "stderr", err := Watched())
    monkeypatch.setattr(sys, "stdout", Tty())
    cli(*args, "-m", "fake")
    at = [err.getvalue().index(sign) for sign in signs]
    assert at == sorted(at)
