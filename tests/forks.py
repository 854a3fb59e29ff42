"""Processes of `dbrx` that start at once: forks of one that has what all of them need, which takes seconds to make."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from tests.cli import ROOT, environment

SERVER = """
import gc, json, os, runpy, signal, socket, sys
signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # Python forgets those that come between a fork and its first step
import torch, model.causal_lm, model.scheduler, dbrx_cli.engine.local, dbrx_cli.engine.resume, dbrx_cli.engine.saved
import dbrx_cli.batch, dbrx_cli.repl.loop, dbrx_cli.repl.prompt
import model.adapters, model.hub.resolve, model.loading, model.lookup, model.session, model.tokenizer
import dbrx_cli.render.jsonl, dbrx_cli.settings_file, psutil, typer._adapters, typer.main
from dbrx_cli.app import app, main
from model.bpe import BytePairEncoder, cl100k_vocabulary
from tests.cli import commands_of
BytePairEncoder(cl100k_vocabulary())
typer.main.get_command = commands_of
commands_of(app)
gc.freeze()
asked = socket.socket(fileno=int(sys.argv[1]))
while True:
    line, fds, _, _ = socket.recv_fds(asked, 1 << 16, 3)
    while line and not line.endswith(b"\\n"):
        line += asked.recv(1 << 16)
    if not line:
        break
    job = json.loads(line)
    if "wait" in job:
        asked.sendall(b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]))
        continue
    pid = os.fork()
    if pid == 0:
        for there, here in enumerate(fds):
            os.dup2(here, there)
        os.closerange(3, max(*fds, asked.fileno()) + 1)
        os.environ.clear()
        os.environ.update(job["variables"])
        sys.argv = ["dbrx", *job["args"]]
        sys.stdin, sys.stdout, sys.stderr = (open(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            runpy.run_module(job["module"], run_name="__main__", alter_sys=True) if job["module"] else main()
        except SystemExit as left:
            os._exit(left.code)
        finally:
            os._exit(1)
    for fd in fds:
        os.close(fd)
    asked.sendall(b"%d\\n" % pid)
"""


class Forks:
    """Starts processes; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", SERVER, str(theirs.fileno())]
            self._server = subprocess.Popen(command, env=environment(), cwd=ROOT, pass_fds=[theirs.fileno()])

    def _ask(self, job: dict[str, object], *fds: int) -> int:
        socket.send_fds(self._socket, [json.dumps(job).encode() + b"\n"], fds)
        answer = b""
        while not answer.endswith(b"\n"):
            if not (more := self._socket.recv(100)):
                raise RuntimeError("the process that forks has ended")
            answer += more
        return int(answer)

    def _on(self, stdin: int, stdout: int, stderr: int, *args: str | Path, module: str = "") -> int:
        """The number of a process: `dbrx`, or `python -m` a module, with these arguments on these files."""
        job: dict[str, object] = {"args": [str(arg) for arg in args], "variables": environment(), "module": module}
        return self._ask(job, stdin, stdout, stderr)

    def start(self, *args: str | Path, module: str = "") -> FileFork:
        """`dbrx`, or `python -m` a module, with these arguments and no stdin."""
        self._count += 1
        out, err = self.folder / f"out{self._count}", self.folder / f"err{self._count}"
        with open(os.devnull) as nothing, out.open("wb") as stdout, err.open("wb") as stderr:
            pid = self._on(nothing.fileno(), stdout.fileno(), stderr.fileno(), *args, module=module)
        return FileFork(self, pid, out, err)

    def piped(self, *args: str | Path) -> PipedFork:
        """`dbrx` with these arguments between pipes, and nothing in the first."""
        (out, stdout), (err, stderr) = os.pipe(), os.pipe()
        with open(os.devnull) as nothing:
            pid = self._on(nothing.fileno(), stdout, stderr, *args)
        os.close(stdout)
        os.close(stderr)
        return PipedFork(self, pid, open(out, "rb"), open(err, "rb"))

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._server.wait()


class Fork:
    """One of them."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self.pid = pid
        self._forks = forks

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def signal_after(self, seconds: float, number: int) -> None:
        time.sleep(seconds)
        self.send_signal(number)

    def wait(self) -> int:
        """Its exit code; negative for the signal that ended it."""
        return self._forks._ask({"wait": self.pid})


class FileFork(Fork):
    """One that writes into files."""

    def __init__(self, forks: Forks, pid: int, out: Path, err: Path) -> None:
        super().__init__(forks, pid)
        self._out, self._err = out, err

    @property
    def out(self) -> bytes:
        """What it has written so far."""
        return self._out.read_bytes()

    @property
    def err(self) -> str:
        return self._err.read_text("utf-8")


class PipedFork(Fork):
    """One that writes into pipes; a context manager, which kills what still runs."""

    def __init__(self, forks: Forks, pid: int, stdout: BinaryIO, stderr: BinaryIO) -> None:
        super().__init__(forks, pid)
        self.stdout, self.stderr = stdout, stderr
        self._code: int | None = None

    def wait(self) -> int:
        self._code = super().wait() if self._code is None else self._code
        return self._code

    def __enter__(self) -> PipedFork:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.stderr.close()
        if self._code is None:
            self.send_signal(signal.SIGKILL)
            self.wait()
