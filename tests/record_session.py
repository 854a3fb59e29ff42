"""Record a chat in a real terminal as docs/session.svg: `make record`.

pexpect types, pyte is the terminal, rich draws its screen. Nothing is staged: the replies are the model's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, ROWS = 92, 30
PICTURE = Path(__file__).parent.parent / "docs" / "session.svg"
COMMAND = "dbrx chat -m demo -t 0"
LINES = [
    "Write a haiku about the sea.",
    "Give me a Python one-liner that reverses a string.",
    "/system You answer in one short sentence.",
    "What is the capital of France?",
]
NAMES = {"brown": "yellow", "brightblack": "bright_black"}  # pyte's names for colours -> rich's


class Session:
    """A program in a terminal whose screen can be drawn."""

    def __init__(self) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self.screen.write_process_input = lambda data: self.process.send(data)
        program = [sys.executable, "-m", "dbrx_cli", *COMMAND.split()[1:]]
        self.process = pexpect.spawn(program[0], program[1:], dimensions=(ROWS, COLUMNS), timeout=300)

    def wait(self, prompts: int) -> None:
        """Until the prompt was shown so many times and the screen is still."""
        still = 0
        while still < 5:
            try:
                self._stream.feed(self.process.read_nonblocking(65536, timeout=0.2))
                still = 0
            except pexpect.TIMEOUT:
                shown = sum(line.startswith(">>>") for line in self.screen.display)
                still = still + 1 if shown >= prompts else 0

    def type(self, text: str) -> None:
        for letter in text:
            self.process.send(letter)
            time.sleep(0.02)
        self.process.send("\r")

    def draw(self) -> Text:
        """The screen with its colours."""
        text = Text(f"$ {COMMAND}\n", style="bold")
        for row in range(ROWS):
            for column in range(COLUMNS):
                cell = self.screen.buffer[row][column]
                text.append(cell.data, _style(cell))
            text.append("\n")
        return text


def _style(cell: pyte.screens.Char) -> Style:
    def colour(name: str) -> str | None:
        if name == "default":
            return None
        return f"#{name}" if len(name) == 6 and all(c in "0123456789abcdef" for c in name) else NAMES.get(name, name)

    return Style(color=colour(cell.fg), bgcolor=colour(cell.bg), bold=cell.bold, italic=cell.italics,
                 underline=cell.underscore, reverse=cell.reverse)  # fmt: skip


def main() -> None:
    """Hold the talk and draw how the screen looks at its end."""
    session = Session()
    for number, line in enumerate(LINES, start=1):
        session.wait(number)
        session.type(line)
    session.wait(len(LINES) + 1)
    console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"), force_terminal=True)
    console.print(session.draw())
    PICTURE.write_text(console.export_svg(title=COMMAND), "utf-8")
    session.process.sendeof()


if __name__ == "__main__":
    main()
