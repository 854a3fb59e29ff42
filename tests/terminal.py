"""A program in a terminal: pexpect types, pyte is the screen."""

from __future__ import annotations

import os
import sys
import termios
import time
import warnings
from collections.abc import Callable, Sequence

import pexpect
import pyte
import pytest

from tests.cli import ROOT, environment


class Screen(pyte.Screen):
    """Remembers what a hostile reply could change, and the text of the rows that have not changed."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.scrolled: list[str] = []  # lines that left at the top
        self._shown: dict[int, str] = {}

    @property
    def display(self) -> list[str]:
        """As pyte makes it, which asks every cell of the screen for its width each time."""
        for row in self.dirty:
            self._shown.pop(row, None)
        self.dirty.clear()
        return [self._shown.get(row) or self._shown.setdefault(row, self._row(row)) for row in range(self.lines)]

    def _row(self, row: int) -> str:
        cells = self.buffer[row]
        return "".join(cells[column].data for column in range(self.columns))  # behind a wide one comes an empty one

    def index(self) -> None:
        if self.cursor.y == (self.margins.bottom if self.margins else self.lines - 1):
            self.scrolled.append(self.display[0].rstrip())
        super().index()


def feed(screen: Screen, sent: str) -> None:
    """Text on its way to a terminal: the system's driver makes every newline a return, too."""
    pyte.Stream(screen).feed(sent.replace("\n", "\r\n"))


def instead_of(main: Callable[[], None], arguments: Sequence[str], variables: dict[str, str]) -> Callable[[], None]:
    """What a child of this process does in the place of another program: it calls `main`."""

    def run() -> None:
        os.closerange(3, 1024)  # as exec does; pexpect waits for it
        os.environ.clear()
        os.environ.update(variables)
        sys.argv = ["dbrx", *arguments]
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        warnings.resetwarnings()
        code = 1
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)

    return run


def spawn(*args: str, columns: int = 80, rows: int = 24, **variables: str) -> pexpect.spawn[str]:
    """`dbrx` in a terminal, by a fork of this process, whose open sessions (SQLite) it cannot use."""
    from dbrx_cli.app import main

    around = environment(**{"TERM": "xterm", **variables})
    return pexpect.spawn(
        sys.executable, [], dimensions=(rows, columns), env=around, cwd=str(ROOT), encoding="utf-8", timeout=60,
        preexec_fn=instead_of(main, args, around),
    )  # fmt: skip


class Terminal:
    """What is typed, and what the screen shows."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        main: Callable[[], None] | None = None,
        columns: int = 100,
        rows: int = 30,
        variables: dict[str, str] | None = None,
    ) -> None:
        """command: a program and its arguments; or those of `main`, which a fork of this process calls."""
        self.screen = Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.received = b""
        self.typed = ""
        self.flags = 0  # the terminal's local modes (termios), as the program left them
        # Answers the program's question where the cursor is, as a real terminal does.
        self.screen.write_process_input = lambda data: self.process.send(data)  # type: ignore[method-assign]
        around = environment(**{"TERM": "xterm-256color", **(variables or {})})
        self.process = pexpect.spawn(
            sys.executable if main else command[0],
            [] if main else list(command[1:]),
            dimensions=(rows, columns),
            env=around,
            cwd=str(ROOT),
            timeout=60,
            preexec_fn=instead_of(main, command, around) if main else None,
        )
        self.process.delaybeforesend = None
        self.process.ptyproc.delayafterclose = self.process.ptyproc.delayafterterminate = 0.02

    def end(self) -> None:
        """End the program, whatever it is doing."""
        try:
            self.process.close(force=True)
        except pexpect.ExceptionPexpect:  # it was killed, and a busy machine takes its time
            self.process.ptyproc.wait()

    def type(self, text: str) -> None:
        self.typed += text
        self.process.send(text)

    def resize(self, columns: int, rows: int) -> None:
        self.process.setwinsize(rows, columns)
        self.screen.resize(rows, columns)

    @property
    def text(self) -> str:
        """All lines of the screen, without what is blank."""
        return "\n".join(line.rstrip() for line in self.screen.display).strip()

    @property
    def transcript(self) -> str:
        """What has scrolled off, and the screen."""
        return "\n".join([*self.screen.scrolled, self.text])

    def until(self, shows: str | Callable[[str], object], seconds: float = 30) -> str:
        """Feed the screen until it shows what is waited for; fail with the screen otherwise."""
        found = (lambda text: shows in text) if isinstance(shows, str) else shows
        end = time.monotonic() + seconds
        while not found(self.text):
            if time.monotonic() > end:
                pytest.fail(f"the screen never showed {shows!r}:\n{self.text}")
            try:
                data = self.process.read_nonblocking(65536, timeout=0.2)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                if not found(self.text):
                    pytest.fail(f"the program ended, and never showed {shows!r}:\n{self.text}")
                break
            self.received += data
            self.stream.feed(data)
        return self.text

    def leave(self) -> int | None:
        """Wait for the end of the program; its exit code, or minus the signal that ended it."""
        self.process.expect(pexpect.EOF)
        self.stream.feed(self.process.before or b"")
        assert self.screen.display == pyte.Screen.display.fget(self.screen)  # type: ignore[attr-defined]
        self.flags = termios.tcgetattr(self.process.fileno())[3]
        self.process.close()
        return self.process.exitstatus if self.process.signalstatus is None else -self.process.signalstatus
