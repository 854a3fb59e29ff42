"""`dbrx download` as a process, against a Hub on this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cli import COMMAND, ROOT, Cli, environment
from tests.hub_server import FakeHub, checkpoint, fake_hub


def run(hub: FakeHub, cache: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    variables = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    }
    return subprocess.run(
        [*COMMAND, "download", *map(str, args)],
        env=environment(**variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_dry_run_download_and_download_again(tmp_path: Path) -> None:
    files = checkpoint()
    with fake_hub() as hub:
        hub.add("some-org/model", files)
        plan = run(hub, tmp_path / "cache", "some-org/model", "--dry-run")
        assert plan.returncode == 0 and "config.json" in plan.stdout and "total" in plan.stdout
        done = run(hub, tmp_path / "cache", "some-org/model", "--to", tmp_path / "here")
        assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "here")
        for path in (tmp_path / "here").rglob("*.safetensors"):
            assert path.read_bytes() == files[path.name]
        again = run(hub, tmp_path / "cache", "some-org/model", "--to", tmp_path / "here", "--verify", "-q")
        assert (again.returncode, again.stderr) == (0, "")


def test_an_empty_folder_name_is_refused(cli: Cli) -> None:
    ran = cli("download", "some-org/model", "--to", "")
    assert ran.code == 2 and "--to is empty" in ran.fault


def test_what_the_hub_refuses_is_one_line(tmp_path: Path) -> None:
    with fake_hub() as hub:
        result = run(hub, tmp_path / "cache", "databricks/dbrx-instruct")
        assert result.returncode == 4 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert "databricks/dbrx-instruct" in line and "HF_ENDPOINT" in line
