"""Notices amid a talk: wrapped by words, dimmed so that they stand apart from replies, and never obeyed."""

from __future__ import annotations

import shutil
import sys
from textwrap import fill

from dbrx_cli.output import moves_cursor, tell_lines
from dbrx_cli.report import Report
from model.errors import DbrxError
from model.foreign_text import on_one_line


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
        text, dim = on_one_line(f"dbrx: {text}"), False
        if sys.stderr.isatty():
            columns = shutil.get_terminal_size().columns
            text = fill(text, max(20, columns - 1), subsequent_indent="  ", break_on_hyphens=False)
            dim = moves_cursor(sys.stderr)
        tell_lines(text, dim=dim)
