"""From the model options to an engine that is ready."""

from __future__ import annotations

from dbrx_cli.engine import Engine
from dbrx_cli.options import EngineOptions
from dbrx_cli.report import Report


def open_engine(options: EngineOptions, report: Report) -> Engine:
    """Ask the server, or load the model here; what the other one needs is not imported (torch takes seconds)."""
    if options.url is not None:
        from dbrx_cli.engine.remote import RemoteEngine

        with report.status("asking the server for its models"):
            return RemoteEngine.open(options, report)
    with report.status(f"starting {options.model}"):
        from dbrx_cli.engine.local import LocalEngine

        return LocalEngine.load(options, report)
