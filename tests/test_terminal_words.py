"""What the terminal says where a person has slipped, in one line, and other words that need no terminal to be tried."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from dbrx_cli.bench import Machine, Result, plot
from dbrx_cli.commands import chat
from dbrx_cli.commands.doctor import verdict
from dbrx_cli.conversation import Conversation
from dbrx_cli.doctor import Check
from dbrx_cli.options import OutputOptions
from dbrx_cli.render.console import PlainConsole, figures
from dbrx_cli.repl import loop
from dbrx_cli.repl.commands import COMMANDS
from dbrx_cli.repl.prompt import dropped_file
from dbrx_cli.repl.signals import Signals
from dbrx_cli.repl.typeahead import Typeahead
from dbrx_cli.report import Report
from dbrx_cli.store import Recorder
from model.sampling import SamplingParams
from tests.cli import Cli
from tests.fake_chat import FakeEngine


@pytest.mark.parametrize(
    "args, says",
    [
        ("quantize demo out", "Missing option '--to' (int8, int4, int3); see dbrx quantize --help"),
        ("quantize demo out --to int5", "'int5' is not one of 'int8', 'int4', 'int3'"),
        ("quantize demo out --quantize int3", "No such option: --quantize; dbrx quantize calls it --to"),
        ("export out.gguf --to q8_0", "No such option: --to; dbrx export calls it --type"),
        ("generate --type int4 hi", "No such option: --type; dbrx generate calls it --quantize"),
        ("generate -t warm hi", "it must be a number"),
        ("-m demo", "-m stands behind a command; type dbrx chat -m demo"),
        ("help", "type dbrx --help"),
        ("version", "type dbrx --version"),
        ("chat demo", "a model is named by -m: dbrx chat -m demo"),
        ("chat sea.png", "'sea.png' cannot be read"),
    ],
)
def test_a_slip_is_told_in_one_line(cli: Cli, args: str, says: str) -> None:
    result = cli(*args.split())
    assert result.code == 2 and says in result.fault, result


def test_a_question_in_the_place_of_a_command(cli: Cli) -> None:
    assert "to ask the model: dbrx generate 'why is it?'" in cli("why is it?").fault


@pytest.mark.parametrize(
    "kind, begins", [("an image", b"\x89PNG\r\n\x1a\n"), ("an image", b"RIFF\0\0\0\0WEBP"), ("a PDF", b"%PDF-1.7")]
)
def test_what_is_no_text_is_refused_by_name_before_a_model_is_loaded(
    cli: Cli, tmp_path: Path, begins: bytes, kind: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(begins + b"rest")
    for args in (("generate", "-m", "none", "-f", file, "hi"), ("chat", "-m", "none", file)):
        assert f"{file} is {kind}" in cli(*args).fault


def test_dropped_files(tmp_path: Path) -> None:
    file = tmp_path / "a b.txt"
    file.touch()
    for pasted in (f"'{file}'", f"{file} ", str(file).replace(" ", "\\ "), f"file://{str(file).replace(' ', '%20')}"):
        assert dropped_file(pasted) == str(file)
    for pasted in (f"see {file}", "a b.txt", "/no/such/file", f"{file}\n{file}", "it's", str(tmp_path)):
        assert dropped_file(pasted) is None


def test_a_ctrl_c_in_haste_does_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    repl = loop.Repl(
        FakeEngine(), Conversation(), SamplingParams(), (), Report(OutputOptions()),
        Recorder("chat", "fake", None, {}, print, enabled=False), Signals(), Typeahead(), name="fake", asked="fake",
    )  # fmt: skip
    assert not repl.in_haste
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 100.0))
    repl.stopped_at = 99.9
    assert repl.in_haste
    repl.stopped_at = 99.0
    assert not repl.in_haste


NEED_NOTHING = [name for name, command in COMMANDS.items() if not command.takes_argument]


def test_what_a_command_does_not_know_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a mistyped name is: it may be a message, so nothing is done and a script goes on."""
    monkeypatch.setattr(chat, "open_engine", lambda options, report: FakeEngine())
    monkeypatch.setenv("DBRX_DATA", str(tmp_path))
    assert {"/help", "/clear", "/undo", "/regen", "/trace", "/bye"} <= {*NEED_NOTHING}
    script = "".join(f"{name} of jazz\n" for name in NEED_NOTHING)
    result = cli("chat", "-m", "fake", stdin=f"say one\n{script}say two\n")
    assert (result.code, result.out) == (0, "one\ntwo\n")
    for name in NEED_NOTHING:
        assert f'{name} takes nothing behind it, and there is "of jazz"; type {name} (a message' in result.err
    for line in ("/copy nothing", "/set nothing 1", "/load ²", "/edit ²", "/export nothing", "/branches ²"):
        assert cli("chat", "-m", "fake", stdin=f"say one\n{line}\n").code == 2, line


def test_small_slips_of_a_chat(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mistyped command is told with -q, too; /read takes a name in quotes; /trace knows at once that it cannot."""
    monkeypatch.setattr(chat, "open_engine", lambda options, report: FakeEngine())
    monkeypatch.chdir(tmp_path)
    Path("with space.txt").write_text("words of the sea")
    script = '/foo\n/read "with space.txt"\n/read\n/trace\n'
    told = cli("chat", "-m", "fake", "-q", "--no-log", stdin=script).err
    assert "there is no command /foo" in told and "with space.txt" in told and "cannot be read" not in told
    assert "/trace needs the model" in told


def test_a_prompt_cache_that_is_none_is_refused_before_a_model_is_looked_for(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes of mine")
    assert "notes.txt" in cli("generate", "-m", "none", "--prompt-cache", tmp_path / "notes.txt", "hi").fault


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_the_legend_of_a_plan_breaks_no_name(
    columns: int, cli: Cli, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = cli("plan", tiny_checkpoint, "--devices", "24GiB,cpu=64GiB@80GB/s,disk=7GB/s").out
    for name in ("█ weights", "KV cache", "· free"):
        assert name in shown.replace("\N{NO-BREAK SPACE}", " ")


def test_doctor_ends_with_a_verdict() -> None:
    good, odd, bad = (Check(name, state, "") for name, state in (("a", "ok"), ("b", "warning"), ("c", "problem")))  # type: ignore[arg-type]
    assert verdict([good]) == "usable, and nothing is wrong"
    assert verdict([good, odd]) == "usable; worth a look: b"
    assert verdict([good, odd, bad]).startswith("not usable as it is: c;")


@pytest.mark.parametrize("lengths", [(512,), (128, 512, 2048)])
def test_a_plot_has_round_marks_and_one_length_is_a_level(lengths: tuple[int, ...]) -> None:
    machine = cast(Machine, SimpleNamespace(stream_gb_s=20.0, threads=2))
    results = [
        cast(
            Result,
            SimpleNamespace(prompt_tokens=n, bytes_per_token=1.9e9 + n, decode_tokens_per_s=7.3, quantize="int8"),
        )
        for n in lengths
    ]
    picture = plot(results, machine)
    lines = [
        [tuple(map(float, point.split(","))) for point in path.split()]
        for path in re.findall(r'polyline points="([^"]+)"', picture)
    ]
    assert len(lines) == 2 and all(line[-1][0] - line[0][0] > 300 for line in lines)
    marks = [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)<', picture)]
    steps = {round(b - a, 9) for a, b in pairwise(marks)}
    assert len(marks) >= 3 and len(steps) == 1 and steps.pop() in (1, 2, 5)


@pytest.mark.parametrize("width", [100, 40])
def test_a_table_of_numbers_breaks_none(width: int) -> None:
    console = PlainConsole(width=width, file=io.StringIO())
    titles = [f"title {i}" for i in range(8)]
    rows = [[f"{i}{n},000.125" for i in range(8)] for n in (1, 2)]
    console.print(figures(console, titles, rows))
    shown = [line.split("  ") for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in shown]
    assert cells == ([titles, *rows] if width == 100 else [list(row) for row in zip(titles, *rows, strict=True)])


def test_config_get_and_edit(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tmp_path / "editor.sh"
    editor.write_text('#!/bin/sh\nprintf "seed = %s\\n" "$SEED" > "$1"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    monkeypatch.setenv("SEED", "7")
    assert cli("config", "edit").code == 0
    assert cli("config", "get", "seed").out == "7\n"
    monkeypatch.setenv("SEED", "'many'")
    assert "seed" in cli("config", "edit").fault
    assert cli("config", "get", "seed").out == "7\n"
    monkeypatch.setenv("SEED", "1\n[profiles.precise]\ntop_k = 1")
    assert cli("config", "edit").code == 0
    assert "there are precise" in cli("config", "get", "seed", "--profile", "nope").fault
