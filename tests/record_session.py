"""Record chats in a real terminal as docs/session*.svg, and a trace as docs/routing.svg: `make record`.

pexpect types, pyte is the terminal, rich draws its screen. Nothing is staged: the replies are the model's.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from rich.text import Text

from dbrx_cli.repl.prompt import PLACEHOLDER
from tests.terminal import Terminal

DOCS = Path(__file__).parent.parent / "docs"
COMMAND = "dbrx chat -m demo -t 0 -n 150"
NAMES = {"brown": "yellow", "brightblack": "bright_black"} | {
    f"bright{name}": f"bright_{name}" for name in ("red", "green", "blue", "magenta", "cyan", "white")
}  # pyte's names for colours -> rich's
PATIENCE_S = 300
TRACED = "The capital of France is Paris. In 1969, two people walked on the Moon; the world watched."


@dataclass(frozen=True)
class Picture:
    """What is typed, in a window of what size."""

    name: str
    columns: int
    rows: int
    lines: tuple[str, ...]
    light: bool = False  # on a light background as well, as NAME-light.svg
    shows: str = ""  # the picture is taken as soon as this is seen; without, at the next prompt


NOTES = "".join(
    f"Day {i}: the boat left the harbour at {i % 12} o'clock and came back with fish.\n" for i in range(1, 61)
)
PICTURES = (
    Picture(
        "session",
        92,
        36,
        (
            "Write a short Python function that reverses a string, with a docstring.",
            "/system You answer in one short sentence.",
            "What is the capital of France?",
        ),
        light=True,
    ),
    Picture("session-reading", 80, 12, (f"\x1b[200~{NOTES}\x1b[201~ When did it leave?",), shows="left; Ctrl-C stops"),
    Picture("session-help", 92, 28, ("/help",)),
    Picture("session-narrow", 40, 26, ("Name three fruits as a Markdown list, with one **bold** word each.", "/regen")),
)


def record(picture: Picture, data: str) -> None:
    """Hold the talk and draw how the screen looks at its end."""
    program = [sys.executable, "-m", "dbrx_cli", *COMMAND.split()[1:]]
    size = {"columns": picture.columns, "rows": picture.rows}
    terminal = Terminal(program, variables={"DBRX_DATA": data}, **size)
    for line in picture.lines:
        _wait(terminal)
        for letter in [line] if line.startswith("\x1b") else line:  # a paste comes at once
            terminal.type(letter)
            time.sleep(0.02)
        terminal.type("\r")
    if picture.shows:
        terminal.until(picture.shows, seconds=PATIENCE_S)
    else:
        _wait(terminal)
    themes = {"": SVG_EXPORT_THEME} | ({"-light": DEFAULT_TERMINAL_THEME} if picture.light else {})
    for suffix, theme in themes.items():
        console = Console(record=True, width=picture.columns, file=open("/dev/null", "w"), force_terminal=True)
        console.print(draw(terminal.screen))
        (DOCS / f"{picture.name}{suffix}.svg").write_text(console.export_svg(title=COMMAND, theme=theme), "utf-8")
    if picture.shows:
        terminal.type("\x03")
        _wait(terminal)
    terminal.type("\x04")
    terminal.leave()


def draw(screen: pyte.Screen) -> Text:
    """The screen with its colours."""
    text = Text(f"$ {COMMAND}\n", style="bold")
    for row in range(screen.lines):
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            text.append(cell.data, _style(cell))
        text.append("\n")
    return text


def _wait(terminal: Terminal) -> None:
    """Until an empty prompt stands there, with its bar, and is drawn whole: one more than when this was called."""
    before = terminal.received.count(b"\x1b[?2004h")

    def ready(text: str) -> bool:
        if terminal.received.count(b"\x1b[?2004h") == before:
            return False
        row = terminal.screen.display[terminal.screen.cursor.y].rstrip().removesuffix(PLACEHOLDER).rstrip()
        return row == ">>>" and " tokens" in text.splitlines()[-1]

    terminal.until(ready, seconds=PATIENCE_S)
    end = time.monotonic() + 1
    terminal.until(lambda text: time.monotonic() > end)


def _style(cell: pyte.screens.Char) -> Style:
    def colour(name: str) -> str | None:
        if name == "default":
            return None
        return f"#{name}" if len(name) == 6 and all(c in "0123456789abcdef" for c in name) else NAMES.get(name, name)

    return Style(color=colour(cell.fg), bgcolor=colour(cell.bg), bold=cell.bold, italic=cell.italics,
                 underline=cell.underscore, reverse=cell.reverse)  # fmt: skip


def record_routing() -> None:
    """Draw what `dbrx trace` prints on a terminal of 92 columns."""
    from dbrx_cli.demo import ensure_demo
    from dbrx_cli.render import routing
    from model import AutoTokenizer, DbrxForCausalLM
    from model.trace import record as trace

    folder = ensure_demo(print, name="demo-moe")
    ids = AutoTokenizer.from_pretrained(folder).encode(TRACED)
    traced = trace(DbrxForCausalLM.from_pretrained(folder, dtype="float32"), ids)
    console = Console(record=True, width=92, file=open("/dev/null", "w"), force_terminal=True, color_system="truecolor",
                      highlight=False, markup=False)  # fmt: skip
    console.print(routing.title(traced, "demo-moe", len(ids)), style="bold")
    console.print(routing.heat_map(traced))
    console.print(routing.figures(traced))
    (DOCS / "routing.svg").write_text(console.export_svg(title="dbrx trace -m demo-moe --raw"), "utf-8")


def main() -> None:
    """All pictures."""
    record_routing()
    with tempfile.TemporaryDirectory() as data:
        for picture in PICTURES:
            record(picture, data)


if __name__ == "__main__":
    main()
