"""Chats that get a signal just behind a reply: `python -m tests.signal_processes FOLDER COUNT SEED` tells how they end.

Forks of one process, a few at a time. Started by test_signals.py.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fake_chat import main

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
AT_ONCE = 10
REPLY = "shown whole"


class Chat(NamedTuple):
    pid: int
    folder: Path
    stdin: int
    stdout: int
    number: signal.Signals
    turns: int


def talk(folder: Path) -> int:
    """A chat from stdin; its exit code."""
    os.environ["DBRX_DATA"] = str(folder / "data")
    sys.argv = ["dbrx", "-m", "fake"]
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def start(folder: Path, number: signal.Signals, turns: int) -> Chat:
    """A chat of a script that has so many turns and does not end."""
    folder.mkdir()
    read, stdin = os.pipe()
    stdout, write = os.pipe()
    os.write(stdin, f"say {REPLY}\n".encode() * turns)
    pid = os.fork()
    if pid == 0:
        for here, there in ((read, 0), (write, 1), (write, 2)):
            os.dup2(here, there)
        os.closerange(3, 100)
        sys.stdin, sys.stdout = open(0), open(1, "w")
        try:
            os._exit(talk(folder))
        finally:
            os._exit(1)  # never on into what the others are for
    os.close(read)
    os.close(write)
    return Chat(pid, folder, stdin, stdout, number, turns)


def hit(chat: Chat, seconds: float) -> dict[str, object]:
    """Wait for the replies, and for a moment; send the signal, and see what is left."""
    shown = b""
    # Against SIGKILL nothing can be done after the fact: a reply counts as shown whole when its line has ended.
    while shown.count(REPLY.encode() + b"\n" * (chat.number == signal.SIGKILL)) < chat.turns:
        data = os.read(chat.stdout, 1000)
        if not data:
            break
        shown += data
    time.sleep(seconds)
    os.kill(chat.pid, chat.number)
    sent = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(chat.pid, 0)[1])
    took = time.monotonic() - sent
    for pipe in (chat.stdin, chat.stdout):
        os.close(pipe)
    connection = sqlite3.connect(chat.folder / "data" / "sessions.db")
    kept = [content for (content,) in connection.execute("SELECT content FROM messages ORDER BY position")]
    connection.close()
    whole = kept == [f"say {REPLY}", REPLY] * chat.turns
    return {"signal": chat.number, "turns": chat.turns, "code": code, "took": took, "whole": whole, "kept": kept}


def run(folder: Path, count: int, seed: int) -> None:
    sys.stdin, stdout, sys.stdout = io.TextIOWrapper(io.BytesIO(b"hello\n")), sys.stdout, io.StringIO()
    talk(folder / "first")  # so that all is imported before the forks
    sys.stdout = stdout
    source = random.Random(seed)
    cases = [(SIGNALS[i % len(SIGNALS)], 1 + i // len(SIGNALS) % 2) for i in range(count)]
    for first in range(0, count, AT_ONCE):
        some = list(enumerate(cases))[first : first + AT_ONCE]
        chats = [start(folder / str(i), number, turns) for i, (number, turns) in some]
        for chat in chats:
            print(json.dumps(hit(chat, source.choice((0, source.uniform(0, 0.1))))), flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
