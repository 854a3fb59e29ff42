"""How wide the columns of a table are: headings wrap first, and no word is broken."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len


def widths(head: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Cells for each column, `room` in all; None if not even the longest words fit beside each other.

    A column has at least its longest word. What is left goes first to what the cells still want, then to the headings:
    of 30 cells for a heading of 20 over "1" and texts of 25, the texts get 25 and the heading wraps within 5.
    """
    columns = [[row[i] for row in rows] for i in range(len(head))]
    least = [max(map(_word, [title, *column])) for title, column in zip(head, columns, strict=True)]
    if sum(least) > room:
        return None
    cells = [max([low, *map(_line, column)]) for low, column in zip(least, columns, strict=True)]
    whole = [max(low, _line(title)) for low, title in zip(cells, head, strict=True)]
    return _grown(_grown(least, cells, room), whole, room)


def _grown(now: list[int], wanted: list[int], room: int) -> list[int]:
    """As much of what is wanted as there is room for, shared by what each lacks."""
    lacks = [max(0, most - width) for width, most in zip(now, wanted, strict=True)]
    left, lacking = min(room - sum(now), sum(lacks)), sum(lacks)
    return [width + (left * lack // lacking if lacking else 0) for width, lack in zip(now, lacks, strict=True)]


def _word(text: str) -> int:
    return max([1, *map(cell_len, text.split())])


def _line(text: str) -> int:
    return max([1, *map(cell_len, text.split("\n"))])
