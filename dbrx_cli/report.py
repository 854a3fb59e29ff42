"""What goes to stderr beside the reply: notices, progress bars (on a terminal only), statistics."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from dbrx_cli.options import OutputOptions
from dbrx_cli.output import above, moves_cursor, tell, tell_lines
from dbrx_cli.status import Status
from model.errors import DbrxError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

DEBUG = "DBRX_DEBUG"
NARROW = 60  # columns below which amounts and the time left take the place of a bar
Advance = Callable[[int, int], None]  # done, total


class Report:
    """Tells how the work goes; quiet tells nothing, verbose tells timings as well.

    From when it is made on, it also tells what `warnings` and logs of libraries bring: each once and in one line,
    without the place in the source that Python would show.
    """

    def __init__(self, options: OutputOptions) -> None:
        self.quiet = options.quiet
        self.verbose = options.verbose
        self._warned: set[str] = set()
        warnings.showwarning = self._hear  # type: ignore[assignment]  # what else is passed says where in the source
        logging.lastResort = _Log(self)  # for what no handler of a library's own takes

    def _hear(self, message: Warning | str, *_: object) -> None:
        text = " ".join(str(message).split())
        if text not in self._warned:
            self._warned.add(text)
            self.notice(text)

    def notice(self, text: str) -> None:
        """A line that the user should know of."""
        if not self.quiet:
            self.tell(text)

    def line(self, text: str) -> None:
        """An answer to the user's own question, quiet or not."""
        tell_lines(text)

    def error(self, fault: DbrxError) -> None:
        """A fault after which the program goes on."""
        self.tell(fault.one_line)

    def detail(self, text: str) -> None:
        """A line for those who asked with --verbose."""
        if self.verbose and not self.quiet:
            self.tell(text)

    def tell(self, text: str) -> None:
        """The line of each of these."""
        tell(f"dbrx: {text}")

    @property
    def bars(self) -> bool:
        """Whether progress bars are shown."""
        return not self.quiet and moves_cursor(sys.stderr)

    def status(self, doing: str, speed: float = 0.0) -> Status:
        """A line that says what is waited for, on a terminal (see `Status`)."""
        return Status(doing, shown=not self.quiet and sys.stderr is not None and sys.stderr.isatty(), speed=speed)

    @contextmanager
    def bar(self, text: str, *, unit: str = "bytes", at_once: bool = True) -> Iterator[Advance]:
        """A progress bar that goes when the work is done; gives the function to call with (done, total).

        at_once: shown before the first such call, too.
        """
        if not self.bars:
            yield lambda done, total: None
            return
        with above[-1]() if above else nullcontext(), progress(stderr_console(), unit, transient=True) as bars:
            task = bars.add_task(text, total=None, visible=at_once)
            yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)


class _Log(logging.Handler):
    """What libraries log, from warnings on."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report._hear(record.getMessage())


def settle_libraries() -> None:
    """Keep words of libraries from stderr that no handler of ours could hear: traces of Rust, logs of torch's C++.

    With DBRX_DEBUG=1 they stay.
    """
    if os.environ.get(DEBUG) == "1":
        return
    os.environ["RUST_BACKTRACE"] = "0"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda failed: tell(f"dbrx: internal error in a thread: {failed.exc_value!r}")
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = lambda failed: None  # of what is thrown away, nobody can do anything about it


def stderr_console() -> Console:
    """rich on stderr, for bars."""
    from dbrx_cli.render.console import BarConsole

    return BarConsole(stderr=True)


def progress(console: Console, unit: str, transient: bool) -> Progress:
    """A bar with amounts in `unit` ("bytes", or a plain count) and the time left; on a narrow terminal these alone."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    whole = partial(Column, no_wrap=True)
    amount = (DownloadColumn if unit == "bytes" else MofNCompleteColumn)(table_column=whole())
    words = TextColumn("{task.description}", markup=False, table_column=whole(max_width=max(8, console.width - 25)))
    bar = () if console.width < NARROW else (BarColumn(),)
    return Progress(
        words, *bar, amount, TimeRemainingColumn(table_column=whole()), console=console, transient=transient
    )
