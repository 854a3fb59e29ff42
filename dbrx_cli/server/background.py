"""`dbrx serve --background`: the server goes on in a process of its own, and the command ends when it is ready."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from dbrx_cli.private import data_folder, open_private, private_folder
from dbrx_cli.report import Report
from dbrx_cli.running import LOOK_SECONDS, Record, running
from model.errors import DbrxError


def log_path(port: int) -> Path:
    """What the server of a port says."""
    return private_folder(data_folder() / "servers") / f"{port}.log"


def leave_terminal(port: int) -> int:
    """Fork: 0 in the new process, which has no terminal and writes to its log; its number in this one.

    It must have no other threads yet.
    """
    log = open_private(log_path(port), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if pid:
        os.close(log)
        return pid
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for there, here in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(there, here)
    return 0


def wait_until_ready(pid: int, port: int, report: Report) -> Record:
    """Wait until the process serves; its fault is raised if it ends instead. Ctrl-C ends both."""
    try:
        with report.status("loading the model in the background"):
            while True:
                if found := next((each for each in running() if each.pid == pid), None):
                    return found
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    raise _fault(port, os.waitstatus_to_exitcode(status))
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _fault(port: int, code: int) -> DbrxError:
    path = log_path(port)
    *_, last = ["", *path.read_text("utf-8", "replace").splitlines()]
    fault = DbrxError(last.removeprefix("dbrx: ") or f"the server ended with code {code}", f"its log is {path}")
    fault.exit_code = code if code > 0 else 1
    return fault


def told(record: Record) -> str:
    """What the user should know of it."""
    stop = "dbrx serve --stop" + (f" --port {record.path.stem}" if len(running()) > 1 else "")
    return f"{record.name} is served at {record.url}/v1, process {record.pid}; `{stop}` ends it"
