"""The kernels for cards, run by Triton's interpreter: each is compared with float64.

The interpreter is chosen when Triton is imported, so these tests run in a process of their own: `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def interpreted(*args: str) -> subprocess.CompletedProcess[str]:
    """`tests/interpreted.py` in a process that interprets kernels."""
    variables = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def test_kernels_agree_with_float64(tmp_path: Path) -> None:
    done = interpreted("tests/interpreted_kernels.py")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.soak
def test_many_shapes_agree_with_float64() -> None:
    done = interpreted("tests/interpreted_kernels.py", "-m", "soak", "-o", "addopts=")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("arch", "only"),
    [
        (90, ("gate_up", "int4 g32")),
        *(pytest.param(arch, None, marks=pytest.mark.soak) for arch in (80, 89, 90, 100, 120)),
    ],
)
def test_kernels_compile_for_cards_that_are_not_here(
    arch: int, only: tuple[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are loaded 128 bits at a time, threads exchange nothing in the loop, and no register is spilled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    from tests.cuda_offline import CARDS, compile_all

    made = list(compile_all(arch, only))
    assert bool(made)
    for each in made:
        assert each.spilled == each.barriers == 0, each
        assert each.wide >= 4 and each.shared < 48 * 1024 < CARDS[arch].shared, each
