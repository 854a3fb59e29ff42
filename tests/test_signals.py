"""Promise 30: what was shown whole is kept, whatever signal comes behind it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dbrx_cli.repl.signals import Signals
from tests.cli import ROOT, SOON, environment


@pytest.mark.slow
@pytest.mark.parametrize("count", [12, pytest.param(800, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_a_signal_behind_a_reply_takes_nothing_away(tmp_path: Path, count: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    command = [sys.executable, "-m", "tests.signal_processes", str(tmp_path), str(count), str(seed)]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ends = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(ends) == count and all(end["took"] < SOON for end in ends)
    assert [end for end in ends if not end["whole"]] == []
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
    assert all(end["code"] == codes[signal.Signals(end["signal"])] for end in ends)


def test_signals_interrupt_only_where_they_are_heard() -> None:
    steps: list[str] = []
    with pytest.raises(SystemExit) as left, Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        steps.append("waited")
        with pytest.raises(KeyboardInterrupt), signals.heard():
            steps.append("never")
        os.kill(os.getpid(), signal.SIGINT)  # the same one, for an impatient finger
        with signals.heard():
            with signals.waiting():
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                steps.append("saved")
            steps.append("never")
    assert left.value.code == 143 and steps == ["waited", "saved"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("code", "printed"), [(143, ""), (129, ""), (130, "torn down\n"), (0, "torn down\n")])
def test_what_a_signal_ended_waits_for_no_interpreter(code: int, printed: str) -> None:
    """Taking torch down takes a second of CPU: too long for who sent SIGTERM or SIGHUP to a busy machine."""
    script = (
        f"import atexit; from dbrx_cli.engine.follower import leave\natexit.register(print, 'torn down'); leave({code})"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (code, printed, "")
