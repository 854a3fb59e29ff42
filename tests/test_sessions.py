"""`dbrx sessions` against what the store's file holds, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

from dbrx_cli.store import Store
from model.messages import Message
from tests.cli import Cli
from tests.terminal import spawn

HOSTILE = "\x1b]0;owned\x07[bold]tab\there[/x]"


@pytest.fixture
def store(cli: Cli) -> Store:
    store = Store.open()
    for number, name in enumerate(("moe", None, "two words")):
        id = store.begin("generate" if name is None else "chat", "demo", None, {"seed": number}, name)
        turns = [Message("user", f"{HOSTILE} question {number}"), Message("assistant", "A مرحبا reply.")]
        store.save(id, None, turns, {"decode_s": 1.5})
    return store


def test_list_in_a_pipe(cli: Cli, store: Store) -> None:
    lines = [line.split("\t") for line in cli("sessions", "list").out.splitlines()]
    assert [line[:2] for line in lines] == [["3", "two words"], ["2", ""], ["1", "moe"]]
    assert all(len(line) == 7 for line in lines)
    assert lines[1][3:6] == ["generate", "demo", "2"] and lines[1][6].endswith("question 1")
    assert cli("sessions").out == cli("sessions", "list").out
    assert len(cli("sessions", "list", "-n", "2").out.splitlines()) == 2
    assert cli("sessions", "list", "--kind", "generate").out.startswith("2\t")


def test_list_as_json(cli: Cli, store: Store) -> None:
    rows = json.loads(cli("sessions", "list", "--json").out)
    assert [row["id"] for row in rows] == [3, 2, 1]
    assert rows[2] | {"created": "", "updated": ""} == {
        "id": 1, "name": "moe", "kind": "chat", "model": "demo", "revision": None, "created": "", "updated": "",
        "turns": 2, "title": " ".join(f"{HOSTILE} question 0".split()),
    }  # fmt: skip


def test_nothing_yet(cli: Cli) -> None:
    assert (cli("sessions", "list").out, cli("sessions", "list", "--json").out) == ("", "[]\n")
    assert cli("sessions", "search", "x").code == 1


def test_show_and_export_are_what_the_store_says(cli: Cli, store: Store, tmp_path: Path) -> None:
    from dbrx_cli.store import export_json, export_markdown

    session = store.find("moe")
    assert cli("sessions", "show", "moe").out == export_markdown(session)
    assert cli("sessions", "show", "1", "--json").out == export_json(session)
    assert cli("sessions", "export", "moe").out == export_markdown(session)
    for name, text in (("talk.md", export_markdown(session)), ("talk.json", export_json(session))):
        result = cli("sessions", "export", "moe", tmp_path / name)
        assert (result.code, result.out) == (0, "") and (tmp_path / name).read_text() == text
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    again = cli("sessions", "export", "moe", tmp_path / "talk.md")
    assert again.code == 2 and "--force" in again.fault
    assert cli("sessions", "export", "two words", tmp_path / "talk.md", "--force").code == 0
    assert "question 2" in (tmp_path / "talk.md").read_text()
    assert cli("sessions", "export", "moe", tmp_path / "talk.pdf").code == 2
    assert cli("sessions", "export", "moe", tmp_path / "no" / "folder.md").code == 2


def test_search(cli: Cli, store: Store) -> None:
    assert [line.split("\t")[0] for line in cli("sessions", "search", "QUESTION", "1").out.splitlines()] == ["2"]
    (row,) = json.loads(cli("sessions", "search", "question 2", "--json").out)
    assert row["id"] == 3 and "question 2" in row["excerpt"]
    assert len(cli("sessions", "search", "مرحبا").out.splitlines()) == 3
    assert cli("sessions", "search", "nowhere").code == 1


def test_rename_and_remove(cli: Cli, store: Store) -> None:
    assert cli("sessions", "rename", "2", "asked").code == 0 and store.find("asked").id == 2
    taken = cli("sessions", "rename", "2", "moe")
    assert taken.code == 2 and "already" in taken.fault
    unasked = cli("sessions", "remove", "asked")
    assert unasked.code == 2 and "--yes" in unasked.fault and len(store.list()) == 3
    unknown = cli("sessions", "remove", "--yes", "moe", "mo")
    assert unknown.code == 2 and "did you mean moe?" in unknown.fault and len(store.list()) == 3
    caches = Path(os.environ["DBRX_DATA"]) / "caches"
    caches.mkdir()
    for id in (2, 3):
        (caches / f"{id}.kv").write_bytes(b"what was said")
    assert cli("sessions", "remove", "--yes", "asked", "2").err == "dbrx: removed 1 session\n"
    assert [file.name for file in caches.iterdir()] == ["3.kv"]  # the words in a cache go with the session
    assert [entry.name for entry in store.list()] == ["two words", "moe"]
    assert cli("sessions", "remove").code == 2 and cli("sessions", "remove", "--all", "moe").code == 2
    assert cli("sessions", "remove", "--all", "--yes", "-q").err == "" and store.list() == []


def test_a_store_that_cannot_be_used(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DBRX_DATA", str(tmp_path / "file"))
    result = cli("sessions", "list")
    assert result.code == 1 and str(tmp_path / "file") in result.fault


def test_a_damaged_store_is_announced(cli: Cli, store: Store) -> None:
    store.close()
    path = Path(os.environ["DBRX_DATA"]) / "sessions.db"
    path.write_bytes(b"not a database, but longer than a header" * 100)
    result = cli("sessions", "list")
    assert result.code == 0 and "sessions-damaged-" in result.fault
    assert cli("sessions", "list").err == ""


def on_a_terminal(*args: str, columns: int, **variables: str) -> str:
    """What a terminal of that width receives."""
    child = spawn(*args, columns=columns, **variables)
    output: str = child.read()
    child.close()
    assert child.exitstatus == 0, output
    return output


@pytest.mark.parametrize("columns", [40, 100])
def test_the_table_on_a_terminal(store: Store, columns: int) -> None:
    store.close()
    output = on_a_terminal("sessions", "list", "--kind", "all", columns=columns, NO_COLOR="1", TERM="xterm")
    assert "\x1b]" not in output and "\x07" not in output  # a title is shown and never obeyed
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", output).splitlines()]
    assert len(lines) == 4 and all(len(line) <= columns for line in lines)
    assert [line.split()[0] for line in lines[1:]] == ["3", "2", "1"] and "[bold]" in output and "two words" in output
    assert all(re.fullmatch(r"\d\d:\d\d", line.split()[-1]) for line in lines[1:])
    assert ("model" in lines[0]) is (columns > 70)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_colours(cli: Cli, variables: dict[str, str]) -> None:
    output = on_a_terminal("config", "show", columns=80, **{"TERM": "xterm-256color", "NO_COLOR": ""} | variables)
    colours = "\x1b[3" in output or "\x1b[9" in output
    assert not colours and ("\x1b[2m" in output) is (variables.get("TERM") != "dumb")
