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
