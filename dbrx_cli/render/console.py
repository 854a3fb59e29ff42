"""rich's console, for tables and bars: text that it is given is escaped wherever it stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from dbrx_cli.output import passing
from model.foreign_text import escaped

ENDLESS = 100_000  # columns


class PlainConsole(Console):
    """Takes text for text: no markup, no highlighting, and no command of the terminal but rich's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=escaped(segment.text))


class BarConsole(PlainConsole):
    """Of what is wiped again: rich would look for it a row too high where a Ctrl-C has begun another row."""

    @property  # type: ignore[misc]  # nobody sets it
    def size(self) -> ConsoleDimensions:
        width, height = super().size
        return ConsoleDimensions(passing(width), height)


def figures(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of numbers, none of which is broken: where it is too wide, each of `rows` is a column."""
    table = Table(*titles, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    for column in table.columns:
        column.justify = "right"
    if console.measure(table, options=console.options.update(max_width=ENDLESS)).maximum <= console.width:
        return table
    turned = Table.grid(padding=(0, 2))
    for beside in zip(titles, *rows, strict=True):
        turned.add_row(*beside)
    for column in turned.columns[1:]:
        column.justify = "right"
    return turned
