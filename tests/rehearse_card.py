"""`make gpu-rehearsal`: what `make gpu` runs, without a card, one step after the other; the last line is a summary."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from tests.cli import ROOT

PAGE = Path(tempfile.gettempdir()) / "dbrx-card-rehearsal"
TESTS = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "--durations=8"]
TESTS += ["-o", "addopts=", "-o", "timeout=1500"]
INTERPRET = {"TRITON_INTERPRET": "1"}
STEPS = {
    "kernels interpreted": ([*TESTS, "tests/interpreted_kernels.py"], {**INTERPRET, "OMP_NUM_THREADS": "1"}),
    "compiled for five kinds of cards": ([*TESTS, "-k", "compile", "tests/test_cuda_kernels.py"], {}),
    "experts on both sides": ([*TESTS, "-m", "not gpu", "tests/test_hybrid.py"], {}),
    "benches on small shapes": ([sys.executable, "-m", "tests.bench_card", str(PAGE)], INTERPRET),
    "networks on small shapes": ([sys.executable, "-m", "tests.bench_card_network", f"{PAGE}-network"], INTERPRET),
}


def main() -> int:
    """0 if all steps passed."""
    start, told, failed = time.monotonic(), [], []
    for name, (command, variables) in STEPS.items():
        print(f"gpu-rehearsal: {name}", flush=True)
        began = time.monotonic()
        environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", **variables}
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            failed.append(name)
        told.append(f"{name} {time.monotonic() - began:.0f} s")
    result = f"failed at {' and '.join(failed)}" if failed else "all passed"
    seconds = time.monotonic() - start
    print(f"gpu-rehearsal: {result} under triton {version('triton')} in {seconds:.0f} s ({', '.join(told)}); ", end="")
    print(f"figures are in {PAGE}.md and {PAGE}-network.md")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
