"""Run the command line: inside this process for speed, or as a real process where pipes and signals matter."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from model.model_files import ModelFiles
from model.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "dbrx_cli"]
# Seconds in which happens what happens at once, even where other programs have the processor. Where it is this
# process that works, its own time counts (time.process_time).
SOON = 20


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def fault(self) -> str:
        """The one line that a fault prints."""
        (line,) = self.err.splitlines()
        return line


with suppress(ModuleNotFoundError):  # `make gpu` runs tests where there may be little beside PyTorch
    import typer.main

    _build = typer.main.get_command
_read_tokenizer: Any = Tokenizer.from_folder
_tokenizers: dict[object, Any] = {}


@cache
def _built(app: typer.Typer, _markup: str | None) -> Any:
    return _build(app)


def commands_of(app: typer.Typer) -> Any:
    """Typer's commands, made once for each kind of help: to make them takes longer than most of them run."""
    return _built(app, app.rich_markup_mode)


def tokenizer_of(source: str | Path | ModelFiles, padding_side: str = "left") -> Any:
    """`Tokenizer.from_folder`, which reads a folder anew where a file of it has changed.

    With the tokenizer, what is made of it stays: tiktoken's table, what a grammar needs, its fingerprint.
    """
    folder = ModelFiles.of(source).path
    try:
        found = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    except OSError:
        return _read_tokenizer(source, padding_side)
    files = tuple(
        (name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for name, status in found
    )
    key = folder, padding_side, files
    made = _tokenizers.pop(key, None) or _read_tokenizer(source, padding_side)
    _tokenizers[key] = made  # the last used at the end
    if len(_tokenizers) > 4:
        del _tokenizers[next(iter(_tokenizers))]
    return made


class Cli:
    """`dbrx` inside this process, with stdin from bytes and what it writes captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *args: str | Path, stdin: bytes | str = b"") -> Result:
        from dbrx_cli import early
        from dbrx_cli.app import main

        self._monkeypatch.setattr(typer.main, "get_command", commands_of)
        self._monkeypatch.setattr(Tokenizer, "from_folder", tokenizer_of)
        data = stdin.encode() if isinstance(stdin, str) else stdin
        self._monkeypatch.setattr(sys, "argv", ["dbrx", *map(str, args)])
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        early.interrupt()  # this process goes on
        captured = self._capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Result(left.value.code, captured.out, captured.err)


def environment(**more: str) -> dict[str, str]:
    """For a process of its own: one thread, nothing asked of the Hub."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(*args: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """`dbrx` as a process with pipes."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([*COMMAND, *map(str, args)], env=environment(), cwd=ROOT, **(pipes | options))
