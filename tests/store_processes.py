"""Processes that use one store: killed at every system call, or all writing at once. Started by test_store_crash.py.

`python -m tests.store_processes kills FOLDER SCENARIO STEP` prints a JSON line a kill; `... write FILE SESSION N` says
that it is ready, waits for a line, and saves N turns.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dbrx_cli.store import Recorder, Store
from model.messages import Message

TRACEME, SYSCALL, SETOPTIONS = 0, 24, 0x4200
EXITKILL, SYSGOOD = 0x100000, 1
SYSCALL_STOP = signal.SIGTRAP | 0x80
CANNOT_TRACE = 77

OLD = [Message("user", "a " * 3000), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d" * 9000)]
NEW = [*OLD[:3], Message("assistant", "e" * 20000), Message("user", "f"), Message("assistant", "g")]


class Scenario(NamedTuple):
    """What is done to a store, and how it may look afterwards: what `seen` gives."""

    prepared: bool
    act: Callable[[Path], None]
    allowed: list[object]


def save(path: Path) -> None:
    with Store.open(path) as store:
        store.save(1, "new", NEW, {"n": 2})


def remove(path: Path) -> None:
    with Store.open(path) as store:
        store.search("ddd")
        store.remove(1)


def begin(path: Path) -> None:
    recorder = Recorder("chat", "m", None, {}, print, path=path)
    recorder.save("new", NEW, {"n": 2})
    recorder.close()


def plain(system: str, turns: list[Message], timings: dict[str, int]) -> object:
    last = len(turns) - 1
    messages = [[t.role, t.content, json.dumps(timings) if i == last else None] for i, t in enumerate(turns)]
    return [system, messages]


BEFORE, AFTER = plain("old", OLD, {"n": 1}), plain("new", NEW, {"n": 2})
SCENARIOS = {
    "save": Scenario(True, save, [[BEFORE], [AFTER]]),
    "remove": Scenario(True, remove, [[BEFORE], []]),
    # Begun but not saved: a session without turns, which no list of conversations to go on with shows.
    "begin": Scenario(False, begin, [[], [[None, []]], [AFTER]]),
}


def seen(path: Path) -> list[object]:
    """All sessions, read with plain SQL."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    sessions = connection.execute("SELECT id, system FROM sessions ORDER BY id").fetchall()
    sql = "SELECT role, content, timings FROM messages WHERE session = ? ORDER BY position"
    found: list[object] = [[system, [list(row) for row in connection.execute(sql, (id,))]] for id, system in sessions]
    connection.close()
    return found


def kills(folder: Path, name: str, step: int) -> Iterator[dict[str, object]]:
    """Kill the act before and after its system calls, at every `step`th of these moments, in a fresh copy each time.

    Gives how the store looked when it was opened next.
    """
    scenario = SCENARIOS[name]
    start = folder / "start"
    start.mkdir(mode=0o700)
    if scenario.prepared:
        with Store.open(start / "s.db") as store:
            store.save(store.begin("chat", "m", None, {}), "old", OLD, {"n": 1})
    number, alive = 0, False
    while not alive:
        work = folder / str(number)
        shutil.copytree(start, work)
        alive = not _killed_at(number, scenario.act, work / "s.db")
        notices: list[str] = []
        Store.open(work / "s.db", notices.append).close()
        found = seen(work / "s.db")
        yield {"stop": number, "state": scenario.allowed.index(found) if found in scenario.allowed else -1,
               "notices": notices, "finished": alive}  # fmt: skip
        shutil.rmtree(work)
        number += step


def _killed_at(stop: int, act: Callable[[Path], None], path: Path) -> bool:
    """Let a child act, and kill it where it enters or leaves a system call for the `stop`th time. False: it ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        if libc.ptrace(TRACEME, 0, None, None) < 0:
            os._exit(CANNOT_TRACE)
        os.kill(os.getpid(), signal.SIGSTOP)
        act(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(CANNOT_TRACE)
    libc.ptrace(SETOPTIONS, child, None, ctypes.c_void_p(EXITKILL | SYSGOOD))
    for _ in range(stop + 1):
        libc.ptrace(SYSCALL, child, None, None)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return False
        assert os.WSTOPSIG(status) == SYSCALL_STOP, status
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def write(path: Path, session: int, count: int) -> None:
    """Save a turn `count` times: into a session of its own (0), or into one that others write to as well."""
    recorder = Recorder("chat", "m", None, {}, print, path=path)
    turns: list[Message] = []
    if session:
        found = recorder.store().find(session)
        recorder.resume(found)
        turns = found.turns
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(count):
        turns.append(Message("user", f"{os.getpid()} {number}"))
        assert recorder.save(None, turns)
    recorder.close()


if __name__ == "__main__":
    if sys.argv[1] == "kills":
        for line in kills(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])):
            print(json.dumps(line), flush=True)
    else:
        write(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
