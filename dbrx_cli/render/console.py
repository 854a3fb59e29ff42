"""rich's console, for tables and bars: text that it is given is escaped wherever it stands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from model.foreign_text import escaped


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
