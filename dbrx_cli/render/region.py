"""The end of what is on the screen: plain text that is not final, and can be taken back while it is in reach."""

from __future__ import annotations

from rich.cells import get_character_cell_size

TAB = 4
MARGIN = 1  # the last column stays free: terminals disagree about what happens after it is filled


class Region:
    """Wraps text by words and knows how many rows each of its lines took.

    Nothing is written here: each method gives what is to be sent to the terminal. Rows that have scrolled off, and
    rows that stood there when the window changed its size, are out of reach for good.
    """

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._rows = [1]  # of each line; the last one is being written
        self._beyond = 0  # lines at the front that are out of reach since the window changed
        self._column = 0
        self._word: list[str] = []
        self._word_cells = 0

    def resize(self, width: int, height: int) -> None:
        """The window has a new size: how the terminal laid out the old rows again is not known."""
        if (width, height) != self._size:
            self._size = (width, height)
            self._beyond = len(self._rows) if self._rows != [1] or self._column else 0
            self._end_word()

    def add(self, text: str) -> str:
        """More text; a newline begins the next line."""
        out: list[str] = []
        for char in text:
            if char == "\n":
                out.append(char)
                self._rows.append(1)
                self._column = 0
                self._end_word()
            elif char == "\t":
                self._put(" " * (TAB - self._column % TAB), out)
            else:
                self._put(char, out)
        return "".join(out)

    def reach(self) -> int:
        """How many lines can be taken back, the one that is being written among them."""
        rows = lines = 0
        for count in reversed(self._rows[self._beyond :]):
            rows += count
            if rows >= self._size[1]:
                break
            lines += 1
        return lines

    def take_back(self, lines: int) -> str:
        """Wipe the last lines; what is written next begins in their place."""
        assert 0 < lines <= self.reach()
        up = sum(self._rows[-lines:]) - 1
        self._rows[-lines:] = [1]
        self._column = 0
        self._end_word()
        return (f"\x1b[{up}A" if up else "") + "\r\x1b[J"

    def forget(self, lines: int) -> None:
        """The first lines are final."""
        del self._rows[:lines]
        self._beyond = max(0, self._beyond - lines)

    def _put(self, text: str, out: list[str]) -> None:
        """One character, or the spaces of a tab."""
        # Character by character, so that a terminal that joins none of a sequence needs no more room than this.
        cells = sum(map(get_character_cell_size, text))
        width = max(2, self._size[0] - MARGIN)
        if self._column + cells > width:
            self._wrap(out)
        out.append(text)
        self._column += cells
        if text.isspace():
            self._end_word()
        else:
            self._word.append(text)
            self._word_cells += cells

    def _wrap(self, out: list[str]) -> None:
        """Begin a row, and bring the word that is being written along unless it fills a row alone."""
        self._rows[-1] += 1
        if 0 < self._word_cells < self._column:
            out.append(f"\x1b[{self._word_cells}D\x1b[K\n{''.join(self._word)}")
            self._column = self._word_cells
        else:
            out.append("\n")
            self._column = 0
            self._end_word()

    def _end_word(self) -> None:
        self._word.clear()
        self._word_cells = 0
