"""Progress bars: what a terminal shows of them."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from dbrx_cli import report
from dbrx_cli.options import OutputOptions


def shows(screen: io.StringIO, text: str, within: float = 10) -> bool:
    end = time.monotonic() + within
    while text not in screen.getvalue() and time.monotonic() < end:
        time.sleep(0.02)
    return text in screen.getvalue()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_bar_is_there_at_once_or_from_its_first_step_on(monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(report.Report, "bars", True)
    monkeypatch.setattr(report, "stderr_console", lambda: console)
    with report.Report(OutputOptions()).bar("Working", at_once=at_once) as advance:
        assert shows(screen, "Working", within=10 if at_once else 0.5) == at_once
        advance(1000, 2000)
        assert shows(screen, "1.0/2.0 kB")


@pytest.mark.parametrize("columns", [40, 80])
def test_amounts_and_the_time_left_are_whole_on_any_terminal(columns: int) -> None:
    screen = io.StringIO()
    bars = report.progress(Console(file=screen, width=columns), "bytes", transient=True)
    bars.add_task("Quantizing to int3", total=918_100_000, completed=458_300_000)
    bars.console.print(bars.get_renderable())
    (line,) = screen.getvalue().splitlines()
    assert line.startswith("Quantizing") and "458.3/918.1 MB -:--:--" in line and len(line) <= columns
