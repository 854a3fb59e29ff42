"""From the model options to an engine that is ready."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbrx_cli.engine import Engine
from dbrx_cli.options import EngineOptions, ModelOptions
from dbrx_cli.report import Report

if TYPE_CHECKING:
    from dbrx_cli.engine.local import LocalEngine


def open_engine(options: EngineOptions, report: Report) -> Engine:
    """Ask the server, or load the model here; what the other one needs is not imported (torch takes seconds)."""
    if options.url is not None:
        from dbrx_cli.engine.remote import RemoteEngine

        with report.status("asking the server for its models"):
            return RemoteEngine.open(options, report)
    return load_engine(options, report)


def load_engine(options: ModelOptions, report: Report) -> LocalEngine:
    """Load the model into this process."""
    with report.status(f"starting {options.model}"):
        from dbrx_cli.engine.local import LocalEngine

        return LocalEngine.load(options, report)
