"""Processes of `dbrx` that start at once, for kills and signals by the dozen: forks of one that imported everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from tests.cli import ROOT, environment

SERVER = """
import json, os, sys
import torch, model.transformer, model.decode, dbrx_cli.engine.local, dbrx_cli.engine.resume, dbrx_cli.engine.saved
from dbrx_cli.app import main
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        for fd, path in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdin, sys.argv = open(os.devnull), ["dbrx", *job["args"]]
        try:
            main()
        except SystemExit as left:
            sys.stdout.flush()
            os._exit(left.code)
    print(pid, flush=True)
"""


class Forks:
    """Starts processes; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment(), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def _ask(self, job: dict[str, object]) -> int:
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin and stdout
        stdin.write(json.dumps(job).encode() + b"\n")
        stdin.flush()
        return int(stdout.readline())

    def start(self, *args: str | Path) -> Fork:
        """`dbrx` with these arguments, and no stdin."""
        self._count += 1
        out, err = self.folder / f"out{self._count}", self.folder / f"err{self._count}"
        job: dict[str, object] = {"args": [str(arg) for arg in args], "out": str(out), "err": str(err)}
        return Fork(self, self._ask(job), out, err)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        pipes: list[IO[bytes] | None] = [self._server.stdin, self._server.stdout]
        for pipe in pipes:
            if pipe:
                pipe.close()
        self._server.wait()


class Fork:
    """One of them."""

    def __init__(self, forks: Forks, pid: int, out: Path, err: Path) -> None:
        self.pid = pid
        self._forks, self._out, self._err = forks, out, err

    def signal_after(self, seconds: float, number: int) -> None:
        time.sleep(seconds)
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; negative for the signal that ended it."""
        return self._forks._ask({"wait": self.pid})

    @property
    def out(self) -> bytes:
        """What it has written so far."""
        return self._out.read_bytes() if self._out.exists() else b""

    @property
    def err(self) -> str:
        return self._err.read_text("utf-8")
