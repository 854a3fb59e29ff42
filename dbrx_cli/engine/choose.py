"""From the model options to an engine that is ready."""

from __future__ import annotations

from dbrx_cli.engine import Engine
from dbrx_cli.options import ModelOptions
from dbrx_cli.report import Report


def open_engine(options: ModelOptions, report: Report) -> Engine:
    """Load the model here (imported only now: torch takes seconds)."""
    from dbrx_cli.engine.local import LocalEngine

    return LocalEngine.load(options, report)
