"""Promise 27: what others wrote (names, keys, values, messages, stored text) is shown, and no terminal obeys it."""

from __future__ import annotations

import ast
import io
import json
import os
import random
import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dbrx_cli import output
from model.errors import InputError, ModelError
from model.foreign_text import LONGEST, escaped, on_one_line
from model.formats.gguf_file import open_gguf
from tests.terminal import Screen, feed

ROOT = Path(__file__).parent.parent
CLI = sorted((ROOT / "dbrx_cli").rglob("*.py"))
# Who writes to the terminal beside output.py: replies as they stream, the prompt, and sequences of the program's own.
WRITERS = {
    "output.py", "render/plain.py", "render/markdown.py", "render/console.py", "render/blocks.py", "repl/prompt.py",
    "repl/typeahead.py", "repl/signals.py", "repl/clipboard.py",
    "__init__.py",  # before the library can be imported; it repeats one path, as repr() spells it
    "commands/tokenize.py",  # the bytes of tokens, into a pipe only
}  # fmt: skip
PRINTS = re.compile(r"print|(typer\.)?s?echo|Console|(os\.write\()?sys\.std(out|err)(\.buffer)?\.write(lines)?")

SEQUENCES = (
    "\x1b]0;PWNED\x07", "\x9d0;PWNED\x9c", "\x1b[2J", "\x9b31m", "\x1b]52;c;UFdORUQ=\x07", "\x1bc", "\r", "\n", "\x7f",
    "\x08", "\u202e", "\u2066", "\u2028", "\x85", "\x0b", "\x00", "\x1b[?1049h", "\x90q\x9c",
)  # fmt: skip
OBEYED = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
OWN = re.compile("\x1b\\[[0-9;]*m|\x1b\\[\\?25[lh]|\r|\x1b\\[2?K|\x1b\\[1A")  # colours, and how bars move
SEED = 20_240_327


@pytest.mark.parametrize("path", CLI, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_prints_past_the_one_way(path: Path) -> None:
    if str(path.relative_to(ROOT / "dbrx_cli")) in WRITERS:
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not PRINTS.fullmatch(called), f"line {node.lineno}: {called}"


def names(count: int) -> list[str]:
    """Names with what a terminal would obey, at random places."""
    chance = random.Random(SEED)
    found = []
    for _ in range(count):
        parts = [chance.choice((*SEQUENCES, "name", "é", "ملف", "👍", " ")) for _ in range(chance.randint(1, 6))]
        found.append("".join([*parts, chance.choice(SEQUENCES)]))
    return found


class Pty:
    """A terminal in the place of stdout and stderr; what reached it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def shows(self, do: Callable[[], object]) -> str:
        master, slave = os.openpty()
        received = bytearray()

        def read() -> None:
            try:
                while piece := os.read(master, 65536):
                    received.extend(piece)
            except OSError:  # how Linux tells that the other end is closed
                return

        reader = threading.Thread(target=read)
        reader.start()
        with self._monkeypatch.context() as patch, open(slave, "w", encoding="utf-8", errors="backslashreplace") as tty:
            for stream in ("stdout", "stderr"):
                patch.setattr(sys, stream, tty)
            do()
        reader.join()
        os.close(master)
        return received.decode("utf-8").replace("\r\n", "\n")


@pytest.fixture
def pty(monkeypatch: pytest.MonkeyPatch) -> Pty:
    monkeypatch.setenv("TERM", "xterm-256color")
    return Pty(monkeypatch)


def harmless(sent: str) -> None:
    """A terminal that gets this keeps its title, and obeys nothing but colours of the program's own."""
    screen = Screen(200, 50)
    feed(screen, sent)
    assert screen.title == "" and screen.icon_name == "", repr(sent)
    assert not OBEYED.search(OWN.sub("", sent)), repr(sent)


def test_each_way_to_a_terminal_escapes(pty: Pty) -> None:
    from rich.table import Table

    from dbrx_cli.render.console import PlainConsole
    from dbrx_cli.repl.notices import ChatReport
    from dbrx_cli.report import OutputOptions, Report

    def in_a_table(name: str) -> None:
        table = Table(title=name)
        table.add_row(name, "[bold]")
        PlainConsole().print(table)

    ways: list[Callable[[str], object]] = [
        output.tell,
        partial(output.tell_lines, dim=True),
        output.say,
        lambda name: output.say_json({name: name}, indent=2),
        in_a_table,
        lambda name: Report(OutputOptions()).error(InputError(name, name)),
        lambda name: ChatReport(OutputOptions()).notice(name),
    ]
    for name in names(25):
        for way in ways:
            harmless(pty.shows(partial(way, name)))


def test_a_line_is_one_line_and_short() -> None:
    for name in names(25):
        line = on_one_line(name)
        assert line.isprintable() and len(line.splitlines()) == 1
        assert escaped(line) == line
        # The escapes are Python's own, so that nothing is lost.
        assert line.encode("latin-1", "backslashreplace").decode("unicode_escape") == name
    long = on_one_line("a" * 30_000 + "; do this")
    assert len(long) < LONGEST + 60 and long.endswith("; do this") and long.startswith("aaa")
    assert on_one_line("\udcff") == "\\udcff"


def test_json_means_the_same() -> None:
    for name in [*names(25), "\udcff"]:
        value = {name: [name, 1.5, None]}
        text = output.to_json(value)
        assert json.loads(text) == value and not OBEYED.search(text)
        text.encode()  # no half characters


def test_a_pipe_gets_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for name in names(25):
        output.say(name)
        assert capsys.readouterr().out == name + "\n"


def commands(folder: Path, number: int, name: str) -> list[str]:
    """One of the commands that repeat a name, an adapter's, a file's or a value."""
    path = str(folder / name.replace("/", "").replace("\0", ""))
    all_of_them = (
        ["generate", "-m", path, "hi"], ["plan", path, "--devices", "1xH100"], ["tokenize", "-m", path, "hi"],
        ["generate", "-m", "org/gone", "-f", path, "hi"], ["generate", "-m", "org/gone", "--schema", path, "hi"],
        ["generate", "-m", "org/gone", "--batch", path], ["generate", "-m", "org/gone", "--profile", name, "hi"],
        ["models", "path", path], ["models", "remove", name, "-y"], ["quantize", path, "out", "--to", "int8"],
        ["sessions", "show", name], ["sessions", "export", "1", path], ["config", "set", "model", "demo", "--" + name],
        ["generate", "--url", name, "hi"], ["convert", path, path], ["trace", "-m", path, "hi"], [name],
        ["plan", "org/gone", "--devices", name], ["generate", "-m", path, "--json", "hi"],
        ["download", name, "--revision", name], ["models", "remove", path, "-y"],
        ["generate", "-m", "org/gone", "--stop", name, "-t", name, "hi"], ["tokenize", "--decode", name],
        ["chat", "-m", path], ["export", path, path],
    )  # fmt: skip
    return [argument.replace("\0", "") for argument in all_of_them[number % len(all_of_them)]]


def run_on_terminal(pty: Pty, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> str:
    from dbrx_cli.app import main

    def do() -> None:
        with pytest.raises(SystemExit) as left:
            main()
        # Most are no names of anything; to decode blanks is no fault.
        assert left.value.code not in ((1,) if "--decode" in arguments else (0, 1)), (arguments, left.value.code)

    monkeypatch.setattr(sys, "argv", ["dbrx", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    return pty.shows(do)


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_names_on_the_command_line(pty: Pty, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int) -> None:
    print(f"seed {SEED}")
    monkeypatch.setenv("DBRX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DBRX_CONFIG", str(tmp_path / "config.toml"))
    for number, name in enumerate(names(count)):
        harmless(run_on_terminal(pty, monkeypatch, commands(tmp_path, number, name)))


def test_a_command_to_paste_quotes_a_name() -> None:
    with pytest.raises(ModelError) as caught:
        open_gguf(Path("x;touch PWNED;.gguf.part1of2"))
    assert caught.value.hint == "join them: cat 'x;touch PWNED;.gguf'.part*of* > 'x;touch PWNED;.gguf'"


@pytest.mark.parametrize("value", ["x", "0", "-1", "", "1e9", "99999999999999999999", "1,,2"])
def test_settings_that_openmp_does_not_take_are_told_in_our_words(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    from dbrx_cli.cores import drop_wrong

    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert len(list(drop_wrong())) == 1 and "OMP_NUM_THREADS" not in os.environ
    for taken in ("1", " 2 ", "4, 2"):
        monkeypatch.setenv("OMP_NUM_THREADS", taken)
        assert list(drop_wrong()) == [] and os.environ["OMP_NUM_THREADS"] == taken
