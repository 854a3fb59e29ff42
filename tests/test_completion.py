"""Completion: what Tab offers in bash, zsh and fish; quickly, without torch, and nothing that a shell would obey."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from huggingface_hub import constants

from dbrx_cli.store import Store
from model.messages import Message
from tests.cli import COMMAND, ROOT, Cli, environment

pytestmark = pytest.mark.slow  # whole runs and sessions

WORDS = {
    "dbrx gen": ["generate"],
    "dbrx sessions re": ["remove", "rename"],
    "dbrx chat --tempe": ["--temperature"],
    "dbrx chat --attn ": ["auto", "eager", "flash", "sdpa"],
    "dbrx chat -m de": ["demo", "demo-moe"],
    "dbrx generate --model org/": ["org/name"],
    "dbrx generate --profile ": ["precise"],
    "dbrx config set repet": ["repetition_penalty"],
    "dbrx config unset --profile pre": ["precise"],
    "dbrx sessions show ": ["2", "3", "moe"],
    "dbrx sessions remove moe m": ["moe"],
}


@pytest.fixture
def things(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions, a profile and a model to be offered; and names that a shell must never see."""
    with Store.open() as store:
        for name in ("moe", "two words", "$(touch owned)"):
            id = store.begin("chat", "demo", None, {}, name)
            store.save(id, None, [Message("user", 'a\\" ; touch owned ; "[/x]`touch owned`')])
    file = Path(os.environ["DBRX_CONFIG"])
    file.write_text("[profiles.precise]\nseed = 1\n[profiles.'$(touch owned)']\n")
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "dbrx"}')
    hub_is(tmp_path / "hub", monkeypatch)


def hub_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's cache, in this process and in others."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))


Offered = Callable[[str, str], set[str]]


@pytest.fixture
def offered(things: None, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Offered:
    """What the program answers to a shell's script."""

    def ask(shell: str, line: str) -> set[str]:
        variables = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        if shell == "bash":
            variables = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        for name, value in {"_DBRX_COMPLETE": f"complete_{shell}", **variables}.items():
            monkeypatch.setenv(name, value)
        result = cli()
        assert (result.code, result.err) == (0, "")
        assert "touch" not in result.out
        if shell == "zsh":
            return set(re.findall(r'^(?:_arguments .*\(\()?"([^"]+)"', result.out, re.MULTILINE))
        return {answer.split("\t")[0] for answer in result.out.split("\n") if answer}

    return ask


@pytest.mark.parametrize("line", WORDS)
def test_bash_is_offered(offered: Offered, line: str) -> None:
    assert offered("bash", line) == set(WORDS[line])


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_offered_the_same(offered: Offered, shell: str) -> None:
    for line in ("dbrx sessions show ", "dbrx generate --profile ", "dbrx chat --attn "):
        assert offered(shell, line) == set(WORDS[line])


def test_a_fault_offers_nothing_and_says_nothing(offered: Offered, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(os.environ["DBRX_CONFIG"])
    file.write_text("not TOML")
    monkeypatch.setenv("DBRX_DATA", str(file))
    hub_is(file, monkeypatch)
    for line, expected in (
        ("dbrx chat --profile ", set()),
        ("dbrx sessions show ", set()),
        ("dbrx chat -m ", {"demo", "demo-moe"}),
    ):
        assert offered("bash", line) == expected


def test_completion_and_help_load_no_torch(things: None) -> None:
    """Each in a fork of a process that has imported the program."""
    script = """
import contextlib, io, json, os, sys
from dbrx_cli.app import main
for words, variables in json.loads(sys.argv[1]):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    os.environ |= variables
    sys.argv = ["dbrx", *words]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        main()
    heavy = [name for name in ("torch", "transformers", "accelerate", "prompt_toolkit") if name in sys.modules]
    print(json.dumps([words, heavy, bool(out.getvalue())]), flush=True)
    os._exit(0)
"""
    runs: list[tuple[list[str], dict[str, str]]] = [
        ([], {"_DBRX_COMPLETE": "complete_bash", "COMP_WORDS": "dbrx chat -m ", "COMP_CWORD": "3"}),
        (["--help"], {}),
        (["sessions", "list"], {}),
        (["config", "show"], {}),
    ]
    args = [sys.executable, "-c", script, json.dumps(runs)]
    run = subprocess.run(args, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert [json.loads(line) for line in run.stdout.splitlines()] == [[words, [], True] for words, _ in runs], run


PROMPTS = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}


@pytest.fixture(params=PROMPTS)
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """A real shell with `dbrx` on its path and nothing of the user's."""
    name: str = request.param
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "dbrx"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {" ".join(COMMAND)} "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    env: Any = environment(PATH=path, HOME=str(tmp_path), TERM="dumb", INPUTRC="/dev/null")
    child = pexpect.spawn(
        name, [*PROMPTS[name], "-i"], env=env, cwd=str(tmp_path), dimensions=(24, 200), encoding="utf-8", timeout=20
    )
    yield name, child
    child.close(force=True)


def test_a_real_shell_completes(things: None, shell: tuple[str, Any], tmp_path: Path) -> None:
    name, child = shell
    child.sendline(f"dbrx --install-completion {name} > /dev/null 2>&1; echo in''stalled")
    child.expect("installed")
    sources = {"bash": ".bash_completions/dbrx.sh", "zsh": ".zfunc/_dbrx", "fish": ".config/fish/completions/dbrx.fish"}
    assert (tmp_path / sources[name]).exists()
    if name == "zsh":  # a new one: its first Tab loads the completion, and must complete, too
        with (tmp_path / ".zshrc").open("a") as settings:
            settings.write("PS1='new> '\n")
        child.sendline("exec zsh -i")
        child.expect("new> ")
    else:
        child.sendline(f"source {tmp_path / sources[name]}; echo so''urced")
        child.expect("sourced")
    child.send("dbrx sessions show mo\t")
    child.expect("moe ")
    child.send("\x03")
    child.send("dbrx chat -m demo-\t")
    child.expect("demo-moe ")
    child.send("\x03")
    if name != "fish":  # its pager needs more of a terminal
        child.send("dbrx sessions show \t\t")
        child.expect("moe")
    assert not (tmp_path / "owned").exists()
