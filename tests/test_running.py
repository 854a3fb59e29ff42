"""Servers that others find: `--background`, `--stop`, `DBRX_URL=auto`."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dbrx_cli import running
from dbrx_cli.options import ModelOptions
from dbrx_cli.running import Record, recorded, serving, settings_of
from model.errors import InputError
from tests.cli import Cli
from tests.forks import Forks


def record_of(port: int, **options: Any) -> Record:
    settings = settings_of(vars(ModelOptions(**options)))
    return Record(os.getpid(), f"http://127.0.0.1:{port}", "small", settings, needs_key=False)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DBRX_DATA", str(tmp_path))
    return tmp_path


def test_only_what_computes_the_same_is_found(data: Path) -> None:
    here = data / "here"
    here.mkdir()
    record = record_of(8000, model=str(here))
    asked = vars(ModelOptions(model=f"{here}/../here"))
    with recorded(record):
        assert serving(asked, has_key=False) == record
        for other in ({"quantize": "int8"}, {"context": 100}, {"threads": 1}, {"model": "demo"}):
            assert serving(asked | other, has_key=False) is None
    assert serving(asked, has_key=False) is None and not list((data / "servers").iterdir())
    with recorded(replace(record, needs_key=True)):
        assert serving(asked, has_key=False) is None and serving(asked, has_key=True) is not None


def test_what_a_killed_server_left_is_no_server(data: Path) -> None:
    record = record_of(8000)
    record.path.write_text(json.dumps(vars(record)))  # and nobody holds it
    assert running.running() == []
    with recorded(record_of(8001)):
        record.path.write_text("{")
        assert [each.path.stem for each in running.running()] == ["8001"]


def test_which_one_to_stop_must_be_clear(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no server of this program runs"):
        running.stop(None)
    with recorded(record_of(8000)), recorded(record_of(8001)), pytest.raises(InputError, match="ports 8000, 8001"):
        running.stop(None)
    with recorded(record_of(8000)), pytest.raises(InputError, match="at port 8002"):
        running.stop(8002)


@pytest.mark.slow
def test_a_server_in_the_background(
    forks: Forks, cli: Cli, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["generate", "-m", small_checkpoint, "-t", "0", "-n", "4", "--json", "Hello"]
    here = json.loads(cli(*asked).out)
    with forks.piped("serve", "-m", small_checkpoint, "--port", "0", "--background") as starting:
        told = starting.stderr.readline().decode()
        assert starting.wait() == 0 and "is served at http://127.0.0.1:" in told and "dbrx serve --stop" in told
    try:
        monkeypatch.setenv("DBRX_URL", "auto")
        there = json.loads(cli(*asked).out)
        assert there["text"] == here["text"] and there["timings"]["load_s"] == 0 and here["timings"]["load_s"] > 0
        assert json.loads(cli(*asked, "--context", "100").out)["timings"]["load_s"] > 0, "that one is another"
    finally:
        ended = cli("serve", "--stop")
    assert ended.code == 0 and "has ended" in ended.err
    assert cli("serve", "--stop").code == 2


@pytest.mark.slow
def test_a_fault_in_the_background_is_told(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with forks.piped("serve", "-m", tmp_path, "--port", "0", "--background") as starting:
        assert starting.wait() == 3
        assert "its log is" in starting.stderr.read().decode()


@pytest.mark.slow
def test_an_idle_server_ends(forks: Forks, small_checkpoint: Path) -> None:
    with forks.piped("serve", "-m", small_checkpoint, "--port", "0", "--idle-timeout", "0.1s") as process:
        assert process.wait() == 0
        assert "nobody has asked for 0.1 s: the server ends" in process.stderr.read().decode()
