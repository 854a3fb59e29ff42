"""Promises 14 and 16 around the program's main part: Ctrl-C while it is imported, a reader that leaves."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import COMMAND, ROOT, environment

# Ctrl-C when the n-th module is looked for: a moment that no machine's speed changes.
INTERRUPTED_IMPORT = """
import os, signal, sys
import dbrx_cli
class Finder:
    left = {n}
    def find_spec(self, *_):
        Finder.left -= 1
        if not Finder.left:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from dbrx_cli.app import main
sys.argv = ["dbrx", *{arguments}]
main()
"""


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({0}, {0}))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_ctrl_c_in_imports_is_quiet(count: int) -> None:
    chance = random.Random(count)
    for _ in range(count):
        arguments = chance.choice([["--version"], ["sessions", "list"], ["tokenize", "hi"]])
        code = INTERRUPTED_IMPORT.format(n=chance.randint(1, 40), arguments=arguments)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=environment())
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux counts addresses")
@pytest.mark.parametrize(
    "limits",
    [
        (20,),
        pytest.param((*range(12, 120, 4), *range(120, 1400, 40)), marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_too_few_addresses_are_told_in_one_line(tiny_checkpoint: Path, limits: tuple[int, ...]) -> None:
    """Where a library of C++ finds none, it ends the process by signal 11: so they are counted before."""
    command = [*COMMAND, "generate", "-q", "--no-log", "-m", str(tiny_checkpoint), "-n", "1", "hi"]
    for limit in limits:
        run = [sys.executable, "-c", LIMITED.format(limit << 20), *command]
        done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environment())
        if done.returncode == 0 and limit > 900:
            continue
        assert done.returncode == 5, (limit, done)
        assert done.stderr.startswith("dbrx: ") and len(done.stderr.splitlines()) == 1, (limit, done.stderr)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_a_reader_of_the_help_that_leaves(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment()
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, b"")
    process.stderr.close()
