"""Completion: what Tab offers in bash, zsh and fish; quickly, without torch, and nothing that a shell would obey."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

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
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def offered(shell: str, line: str) -> set[str]:
    """What the program answers to the shell's script."""
    words = line.split(" ")
    variables = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    if shell == "bash":
        variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    env = environment(_DBRX_COMPLETE=f"complete_{shell}", **variables)
    run = subprocess.run(COMMAND, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "touch" not in run.stdout
    if shell == "zsh":
        return set(re.findall(r'^(?:_arguments .*\(\()?"([^"]+)"', run.stdout, re.MULTILINE))
    return {answer.split("\t")[0] for answer in run.stdout.split("\n") if answer}


@pytest.mark.parametrize("line", WORDS)
def test_bash_is_offered(things: None, line: str) -> None:
    assert offered("bash", line) == set(WORDS[line])


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_offered_the_same(things: None, shell: str) -> None:
    for line in ("dbrx sessions show ", "dbrx generate --profile ", "dbrx chat --attn "):
        assert offered(shell, line) == set(WORDS[line])


def test_a_fault_offers_nothing_and_says_nothing(things: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(os.environ["DBRX_CONFIG"]).write_text("not TOML")
    monkeypatch.setenv("DBRX_DATA", str(Path(os.environ["DBRX_CONFIG"])))
    monkeypatch.setenv("HF_HUB_CACHE", os.environ["DBRX_CONFIG"])
    for line, expected in (
        ("dbrx chat --profile ", set()),
        ("dbrx sessions show ", set()),
        ("dbrx chat -m ", {"demo", "demo-moe"}),
    ):
        assert offered("bash", line) == expected


def test_completion_and_help_load_no_torch(things: None) -> None:
    script = """
import contextlib, io, json, sys
from dbrx_cli.app import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
print(json.dumps([name for name in ("torch", "transformers", "accelerate", "prompt_toolkit") if name in sys.modules]))
"""
    for words, variables in (
        ([], {"_DBRX_COMPLETE": "complete_bash", "COMP_WORDS": "dbrx chat -m ", "COMP_CWORD": "3"}),
        (["--help"], {}),
        (["sessions", "list"], {}),
        (["config", "show"], {}),
    ):
        args = [sys.executable, "-c", script, *words]
        run = subprocess.run(args, cwd=ROOT, env=environment(**variables), capture_output=True, text=True)
        assert json.loads(run.stdout.splitlines()[-1]) == [], words


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
