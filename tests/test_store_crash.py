"""Promises 18 and 19: sessions are never torn, and two writers are safe."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dbrx_cli.store import Store
from model.messages import Message
from tests.cli import ROOT
from tests.store_processes import CANNOT_TRACE, SCENARIOS

pytestmark = pytest.mark.slow  # whole runs and sessions

PROCESS = [sys.executable, "-m", "tests.store_processes"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs ptrace")
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_every_system_call(tmp_path: Path, scenario: str, step: int) -> None:
    args = [*PROCESS, "kills", str(tmp_path), scenario, str(step)]
    run = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    if run.returncode == CANNOT_TRACE:
        pytest.skip("this machine forbids ptrace")
    assert run.returncode == 0, run.stderr
    kills = [json.loads(line) for line in run.stdout.splitlines()]
    states = [kill["state"] for kill in kills]
    assert len(kills) > 100 / step and kills[-1]["finished"]
    assert -1 not in states, kills[states.index(-1)]
    assert states[0] == 0 and states[-1] == len(SCENARIOS[scenario].allowed) - 1
    assert not any(kill["notices"] for kill in kills)


def write(path: Path, processes: int, turns: int, session: int = 0) -> dict[str, str]:
    """Have processes save turns, all at once; what each was told, by its number."""
    args = [*PROCESS, "write", str(path), str(session), str(turns)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(args, cwd=ROOT, text=True, stdin=pipe, stdout=pipe) for _ in range(processes)]
    for process in running:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    told = {str(process.pid): process.communicate()[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    return told


def stored(path: Path) -> dict[int, list[str]]:
    """The turns of each session, read with plain SQL."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    found: dict[int, list[str]] = {}
    for session, content in connection.execute("SELECT session, content FROM messages ORDER BY session, position"):
        found.setdefault(session, []).append(content)
    connection.close()
    return found


COUNTS = pytest.mark.parametrize(
    ("processes", "turns"), [(4, 10), pytest.param(8, 100, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)


@COUNTS
def test_each_writer_keeps_its_turns(tmp_path: Path, processes: int, turns: int) -> None:
    """They also race to make the file."""
    path = tmp_path / "data" / "s.db"
    told = write(path, processes, turns)
    assert set(told.values()) == {""}
    sessions = stored(path).values()
    assert sorted(sessions) == sorted([f"{pid} {n}" for n in range(turns)] for pid in told)


@COUNTS
def test_writers_of_one_session_part_ways(tmp_path: Path, processes: int, turns: int) -> None:
    path = tmp_path / "data" / "s.db"
    with Store.open(path) as store:
        store.save(store.begin("chat", "m", None, {}), None, [Message("user", "first")])
    told = write(path, processes, turns, session=1)
    sessions = stored(path).values()
    assert sorted(sessions) == sorted(["first", *(f"{pid} {n}" for n in range(turns))] for pid in told)
    # The first to save keeps the session; each of the others is told once where it goes on.
    parted = [notice for notice in told.values() if notice]
    assert len(parted) == processes - 1
    assert all(notice.count("\n") == 1 and "goes on as session" in notice for notice in parted)


def kill_while_it_writes(path: Path, rounds: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    source = random.Random(seed)
    for _ in range(rounds):
        args = [*PROCESS, "write", str(path), "0", "1000000"]
        process = subprocess.Popen(args, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == b"ready\n"
        time.sleep(source.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        notices: list[str] = []
        Store.open(path, notices.append).close()
        assert notices == []
        for contents in stored(path).values():
            assert [content.split()[1] for content in contents] == [str(n) for n in range(len(contents))]


def test_killed_at_random(tmp_path: Path) -> None:
    kill_while_it_writes(tmp_path / "data" / "s.db", 3)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_killed_at_random_at_length(tmp_path: Path) -> None:
    kill_while_it_writes(tmp_path / "data" / "s.db", 100)
