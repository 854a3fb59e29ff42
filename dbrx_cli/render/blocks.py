"""Markdown as rows of a terminal: markdown-it parses, rich styles and measures.

Text is never taken for rich's markup or for HTML, and what a terminal would obey is taken out once more at the end:
an entity such as `&#13;` makes a character that the source did not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from pygments.token import (  # type: ignore[import-untyped]
    Comment,
    Generic,
    Keyword,
    Name,
    Number,
    Operator,
    String,
)
from rich import box
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.table import Table
from rich.text import Text

from dbrx_cli.render.latex import latex
from dbrx_cli.render.plain import safe
from dbrx_cli.render.tables import widths

Row = list[Segment]

# The terminal's own colours, and of them those that can be read on a dark background and on a light one.
THEME = ANSISyntaxTheme(
    {
        Comment: Style(italic=True, dim=True),
        Keyword: Style(color="magenta"),
        Operator.Word: Style(color="magenta"),
        Name.Class: Style(bold=True),
        Name.Function: Style(bold=True),
        Name.Tag: Style(color="magenta"),
        Number: Style(color="red"),
        String: Style(color="green"),
        Generic.Deleted: Style(color="red"),
        Generic.Inserted: Style(color="green"),
        Generic.Heading: Style(bold=True),
    }
)
CONTEXT = 40  # lines of code that are read to highlight the last of them
CODE, LINK, DIM, RULE = "magenta", "dim", Style(dim=True), 40
HEADINGS = {"h1": "bold underline", "h2": "bold", "h3": "bold italic"}
INLINE = {"em": "italic", "strong": "bold", "s": "strike"}
CLOSED_BY_BLANK = ("paragraph_open", "table_open", "blockquote_open")
CLOSED_AT_ONCE = ("heading_open", "hr")
ALIGN = {"text-align:right": "right", "text-align:center": "center"}


@cache
def parser() -> MarkdownIt:
    """CommonMark, tables, strikethrough, LaTeX; HTML is text, and so are link definitions, which would vanish."""
    rules = MarkdownIt("commonmark", {"html": False})
    return rules.enable(["table", "strikethrough"]).disable("reference").use(latex)


@dataclass(frozen=True)
class Piece:
    """A block on the first level, or an item of a list there: the smallest that can be final by itself."""

    start: int  # its first line
    kind: str
    follows: bool  # an item that is not the first of its list


def pieces(lines: Sequence[str]) -> list[Piece]:
    """What the lines hold so far, in order."""
    found = []
    first = False
    for token in parser().parse("\n".join(lines) + "\n"):
        if token.map is None:
            continue
        if token.level == 0 and token.type in ("bullet_list_open", "ordered_list_open"):
            first = True
        elif token.type == "list_item_open" and token.level == 1:
            found.append(Piece(token.map[0], token.type, follows=not first))
            first = False
        elif token.level == 0 and token.nesting >= 0 and token.type != "inline":
            found.append(Piece(token.map[0], token.type, follows=False))
    return found


def code_line(opening: str, line: str) -> str | None:
    """A line of the code block that `opening` began, without the indentation of the block; None if it closes it."""
    (fence,) = parser().parse(f"{opening}\n{line}\n")
    return fence.content.removesuffix("\n") if fence.content else None


def language(opening: str) -> str:
    """What the first line of a code block calls its language."""
    return _language(parser().parse(opening + "\n")[0].info)


class Painter:
    """Makes rows of blocks, and of rows what the terminal is sent."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def ansi(self, rows: Sequence[Row]) -> str:
        """Rows with the escape sequences of their styles; each ends its line."""
        out: list[Segment] = []
        for row in rows:
            out += [Segment(safe(segment.text), segment.style) for segment in _without_trailing_space(row)]
            out.append(Segment("\n"))
        with self._console.capture() as captured:
            self._console.print(Segments(out), end="", crop=False, no_wrap=True, overflow="ignore")
        return captured.get()

    def markdown(self, source: str, width: int) -> list[Row]:
        """The rows of one or more blocks."""
        return self._blocks(SyntaxTreeNode(parser().parse(source)).children, width)

    def code(self, lines: Sequence[str], name: str) -> Row:
        """The last of some lines of code, highlighted. It is not wrapped: who copies it wants it in one piece."""
        return self._segments(_highlight("\n".join(lines), name)[-1])

    def fence(self, line: str) -> Row:
        """A line that opens or closes a block of code: it stays, dimmed, so that it is seen where the code ends."""
        return [Segment(line.strip(), DIM)]

    def _blocks(self, nodes: Sequence[SyntaxTreeNode], width: int) -> list[Row]:
        rows: list[Row] = []
        for i, node in enumerate(nodes):
            if i and not _is_tight(nodes[i - 1]):
                rows.append([])
            rows += self._block(node, width)
        return rows

    def _block(self, node: SyntaxTreeNode, width: int) -> list[Row]:
        match node.type:
            case "paragraph":
                return self._wrapped(self._inline(node), width)
            case "heading":
                return self._wrapped(self._inline(node, HEADINGS.get(node.tag, "italic")), width)
            case "fence" | "code_block":
                return self._code_block(node, width)
            case "hr":
                return [[Segment("─" * min(RULE, width), DIM)]]
            case "blockquote":
                return self._indented(node, width, "│ ", "│ ")
            case "bullet_list" | "ordered_list":
                return self._list(node, width)
            case "table":
                return self._table(node, width)
        raise AssertionError(node.type)  # a rule that `parser` did not enable

    def _list(self, node: SyntaxTreeNode, width: int) -> list[Row]:
        rows: list[Row] = []
        for i, item in enumerate(node.children):
            if i and not _is_tight(node):
                rows.append([])
            mark = f"{item.info}{item.markup} " if node.type == "ordered_list" else "• "
            rows += self._indented(item, width, mark, " " * len(mark)) or [[Segment(mark, DIM)]]
        return rows

    def _indented(self, node: SyntaxTreeNode, width: int, first: str, rest: str) -> list[Row]:
        rows = self._blocks(node.children, max(2, width - len(first)))
        return [[Segment(rest if i else first, DIM), *row] for i, row in enumerate(rows)]

    def _code_block(self, node: SyntaxTreeNode, width: int) -> list[Row]:
        name = _language(node.info)
        lines = _highlight(node.content.removesuffix("\n"), name)
        rows = [row for line in lines for row in self._wrapped(line, width)]
        if node.type == "code_block":
            return rows
        fence = [Segment(node.markup, DIM)]
        return [[Segment(node.markup + name, DIM)], *rows, fence]

    def _table(self, node: SyntaxTreeNode, width: int) -> list[Row]:
        head, *bodies = node.children
        cells = head.children[0].children
        titles = [self._inline(cell) for cell in cells]
        rows = [[self._inline(cell) for cell in row.children] for body in bodies for row in body.children]
        plain = [[cell.plain for cell in row] for row in rows]
        for padding in (1, 0):  # beside the cell of the line between two columns
            room = width - (2 * padding + 1) * (len(cells) - 1)
            if columns := widths([title.plain for title in titles], plain, room):
                break
        else:
            return self._records(titles, rows, width)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, padding), pad_edge=False, show_edge=False, header_style="bold")
        for cell, title, cells_wide in zip(cells, titles, columns, strict=True):
            align = ALIGN.get(str(cell.attrs.get("style", "")), "left")
            table.add_column(title, justify=align, overflow="fold", width=cells_wide)  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*row)
        return self._console.render_lines(table, self._console.options.update(width=width), pad=False)

    def _records(self, titles: list[Text], rows: list[list[Text]], width: int) -> list[Row]:
        """A table whose words do not fit beside each other: one record below the other."""
        made: list[Row] = []
        for i, row in enumerate(rows):
            made += [[]] if i else []
            for title, cell in zip(titles, row, strict=True):
                made += self._wrapped(Text.assemble((title.plain, "bold"), ": ", cell), width)
        return made

    def _inline(self, node: SyntaxTreeNode, style: str = "") -> Text:
        """The text of a block that holds nothing but text."""
        text = Text()
        for child in node.children:
            self._append(text, child, [])
        text.stylize(style)
        return text

    def _append(self, text: Text, node: SyntaxTreeNode, styles: list[str]) -> None:
        match node.type:
            case "softbreak" | "hardbreak":  # verse and addresses keep their lines
                text.append("\n")
            case "code_inline":
                text.append(node.content, " ".join([*styles, CODE]))
            case "image":
                text.append(f"{node.content} ({node.attrs.get('src', '')})", LINK)
            case "link":
                start = len(text)
                for child in node.children:
                    self._append(text, child, styles)
                target = str(node.attrs.get("href", ""))
                if text.plain[start:] not in (target, target.removeprefix("mailto:")):
                    text.append(f" ({target})", LINK)
            case _:
                more = [*styles, INLINE[node.type]] if node.type in INLINE else styles
                if not node.children:
                    text.append(node.content, " ".join(styles))
                for child in node.children:
                    self._append(text, child, more)

    def _wrapped(self, text: Text, width: int) -> list[Row]:
        lines = text.wrap(self._console, width, overflow="fold", tab_size=4)
        return [self._segments(line) for line in lines] or [[]]

    def _segments(self, text: Text) -> Row:
        return [segment for segment in text.render(self._console) if segment.text]


def _highlight(code: str, name: str) -> list[Text]:
    """A text a line; plain if nothing is known of the language."""
    syntax = _syntax(name)
    if syntax is None:
        return [Text(line) for line in code.split("\n")]
    lines = list(syntax.highlight(code).split("\n", allow_blank=True))
    return lines[: code.count("\n") + 1]  # the highlighter ends the last line


@cache
def _syntax(name: str) -> Syntax | None:
    lexer = Syntax("", name, tab_size=0).lexer if name else None  # 0 leaves tabs to the terminal
    return Syntax("", lexer, theme=THEME, background_color="default", tab_size=0) if lexer else None


def _language(info: str) -> str:
    """The first word behind the fence: `python`, `{.python}`, `js:app.js`."""
    word = info.strip().split(maxsplit=1)[0] if info.strip() else ""
    return word.strip("{}.").partition(":")[0]


def _is_tight(node: SyntaxTreeNode) -> bool:
    """A paragraph of a tight list, or such a list: no blank row comes after it, nor between its items."""
    if node.type in ("bullet_list", "ordered_list"):
        return all(_is_tight(child) for item in node.children for child in item.children[:1])
    return node.type == "paragraph" and node.hidden


def _without_trailing_space(row: Row) -> Iterator[Segment]:
    """Spaces at the end of a row would come along when it is copied, and wrap when the window gets narrower."""
    last = len(row)
    while last and not row[last - 1].text.strip(" "):
        last -= 1
    for i, segment in enumerate(row[:last]):
        yield segment if i < last - 1 else Segment(segment.text.rstrip(" "), segment.style)
