"""Notices amid a talk: dimmed, so that they stand apart from replies."""

from __future__ import annotations

import sys

from dbrx_cli.output import moves_cursor, tell
from dbrx_cli.report import Report


class ChatReport(Report):
    """As `Report`, on a terminal to read."""

    def tell(self, text: str) -> None:
        tell(f"dbrx: {text}", dim=moves_cursor(sys.stderr))
