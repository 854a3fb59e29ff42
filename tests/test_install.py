"""`make test-install`: a wheel is built and installed into empty environments, by pip and by uv, and answers there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from model.native import build

ROOT = Path(__file__).parent.parent
TORCH = "torch==2.13.0"
pytestmark = [pytest.mark.install, pytest.mark.timeout(3600)]


def run(*command: str | Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=environment.get("HOME", ROOT)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT, DBRX_NATIVE_BUILD="all")
    (found,) = folder.glob("dbrx_cli-*.whl")
    return found


@pytest.fixture(scope="session")
def torch_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PyTorch as pip finds it here, which may be a build without CUDA that uv does not know of."""
    folder = tmp_path_factory.mktemp("torch")
    run(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, TORCH)
    (found,) = folder.glob("torch-*.whl")
    return found


def answers(dbrx: Path, home: Path) -> None:
    """The installed program answers with the demo model, and finds its native kernels."""
    said = run(dbrx, "generate", "-m", "demo", "-t", "0", "-n", "8", "What is the capital of France?", HOME=str(home))
    assert "Paris" in said
    checks = {check["name"]: check for check in json.loads(run(dbrx, "doctor", "--json", "-m", "demo"))["checks"]}
    variant = checks["native kernels"]["facts"]["variant"]
    assert (variant is not None) == (build.compiler() is not None), checks["native kernels"]


def test_the_wheel_carries_every_variant(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    carried = {Path(name).name for name in names if name.endswith(".so")}
    if build.compiler() is None:
        assert wheel.name.endswith("-py3-none-any.whl") and not carried
        return
    assert carried == {f"dbrx-{name}.so" for name in build.variants(build.architecture())}
    assert build.architecture() in wheel.name
    assert {"model/native/vectors.bin", "model/native/src/dbrx.h", "model/native/build.py"} <= {*names}
    assert not any(name.startswith(("tests/", "model/native/tests/")) for name in names)


def test_pip(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(tmp_path / "venv" / "bin" / "pip", "install", TORCH, wheel)
    answers(tmp_path / "venv" / "bin" / "dbrx", tmp_path)


def test_uv_tool(wheel: Path, torch_wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "with-uv")
    run(tmp_path / "with-uv" / "bin" / "pip", "install", "uv")
    folders = {f"UV_{name}": str(tmp_path / name.lower()) for name in ("TOOL_DIR", "TOOL_BIN_DIR", "CACHE_DIR")}
    version = torch_wheel.name.split("-")[1]
    run(
        *(tmp_path / "with-uv" / "bin" / "uv", "tool", "install", "--python", sys.executable),
        *("--find-links", torch_wheel.parent, "--with", f"torch=={version}", wheel),
        **folders,
    )
    answers(tmp_path / "tool_bin_dir" / "dbrx", tmp_path)
