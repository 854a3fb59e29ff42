"""How a download looks: a bar for all, a bar a file, a table for a dry run."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from dbrx_cli.report import Report, progress, stderr_console
from model.foreign_text import on_one_line

if TYPE_CHECKING:
    from rich.progress import TaskID

    from model.hub import DownloadPlan


ASKS = "asking the Hub"


class Transfer:
    """`model.hub.Progress` on stderr; without a terminal, only a line at the start."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._asking = report.status(ASKS)
        self._bars = progress(stderr_console(), "bytes", transient=True) if report.bars else None
        self._all: TaskID | None = None
        self._files: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._asking.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._asking.end()
        if self._bars:
            self._bars.stop()

    def start(self, total_bytes: int, done_bytes: int, files: int) -> None:
        from rich.filesize import decimal

        here = f", {decimal(done_bytes)} of them here" if done_bytes else ""
        self._asking.end()
        self._report.notice(f"{files} files, {decimal(total_bytes)}{here}")
        if self._bars:
            self._bars.start()
            self._all = self._bars.add_task("all files", total=total_bytes, completed=done_bytes)

    def file(self, name: str, size: int, done: int) -> None:
        if self._bars:
            self._files[name] = self._bars.add_task(on_one_line(name), total=size, completed=done)

    def advance(self, name: str, n_bytes: int) -> None:
        if not self._bars or self._all is None:
            return
        self._bars.advance(self._all, n_bytes)
        task = self._files[name]
        self._bars.advance(task, n_bytes)
        if self._bars.tasks[self._bars.task_ids.index(task)].finished:
            self._bars.remove_task(task)

    def notice(self, text: str) -> None:
        self._report.notice(text)


def print_plan(plan: DownloadPlan) -> None:
    """The files of a download, to stdout."""
    from rich.filesize import decimal
    from rich.table import Table

    from dbrx_cli.render.console import PlainConsole

    table = Table(title=f"{on_one_line(plan.name)} at {plan.commit[:12]}", title_justify="left", box=None)
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("here", justify="right")
    for file in plan.files:
        table.add_row(
            on_one_line(file.path), decimal(file.size), "yes" if file.done == file.size else decimal(file.done)
        )
    table.add_section()
    table.add_row("total", decimal(plan.total_bytes), decimal(plan.total_bytes - plan.missing_bytes))
    PlainConsole().print(table)
