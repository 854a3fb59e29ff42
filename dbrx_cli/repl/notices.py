"""Notices amid a talk: wrapped by words, dimmed so that they stand apart from replies, and never obeyed."""

from __future__ import annotations

import os
import shutil
import sys
from textwrap import fill

from dbrx_cli.render.plain import safe
from dbrx_cli.report import Report
from model.errors import DbrxError


class ChatReport(Report):
    """As `Report`, on a terminal to read."""

    def notice(self, text: str) -> None:
        if not self.quiet:
            self._tell(text)

    def error(self, fault: DbrxError) -> None:
        self._tell(fault.one_line)

    def detail(self, text: str) -> None:
        if self.verbose and not self.quiet:
            self._tell(text)

    def _tell(self, text: str) -> None:
        text = f"dbrx: {safe(text)}"
        if sys.stderr.isatty():
            columns = shutil.get_terminal_size().columns
            text = fill(text, max(20, columns - 1), subsequent_indent="  ", break_on_hyphens=False)
            if os.environ.get("TERM", "dumb") != "dumb":
                text = f"\x1b[2m{text}\x1b[0m"
        print(text, file=sys.stderr, flush=True)
