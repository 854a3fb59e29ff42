"""Markdown as it streams: what the screen shows in the end, and that nothing on it is obeyed, lost or printed twice."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_cli.engine import Delta, Done
from dbrx_cli.render import markdown
from dbrx_cli.render.markdown import MarkdownRenderer
from tests.fake_chat import finished
from tests.terminal import Screen, feed

DONE: Done = finished("")
SAMPLE = """# Title

Some **bold**, *italic*, ~~gone~~ and `code`, a [link](http://a.b/c), <http://d.e>, <b>HTML</b> and [bold]b[/bold].
A second line.

1. one
2. two with words enough to wrap around where the window has only forty columns

   - nested
   - more
10. ten

* loose

* list

```python
def f(x):
	return "[red]" + x  # tab

```
after

| a | b |
|:--|--:|
| 1 | 22 |

> quoted
lazily

---
    indented code
[1]: http://definition
"""
OURS = re.compile(r"\x1b\[(?:[\d;]*m|\d+A|\d+D|J|K)|\r(?=\x1b\[J)")  # what the renderer itself sends


class Tty(io.StringIO):
    """A terminal as far as the renderer sees."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def stream(parts: Sequence[str], columns: int = 80, rows: int = 200, before: str = "") -> str:
    """What is sent to a terminal for a reply that comes in parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MarkdownRenderer, "_size", lambda self: (columns, rows))
        patch.setenv("TERM", "xterm-256color")
        out = Tty()
        renderer = MarkdownRenderer(out, before=before)
        for part in parts:
            renderer.delta(Delta(part, None))
        renderer.done(DONE)
        return out.getvalue()


def shown(sent: str, columns: int = 80, rows: int = 50) -> list[str]:
    """The lines of a terminal's scrollback and screen."""
    screen = Screen(columns, rows)
    feed(screen, sent)
    lines = [*screen.scrolled, *(line.rstrip() for line in screen.display)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def test_blocks_look_as_they_should() -> None:
    assert shown(stream([SAMPLE], 40), 40) == [
        "Title",
        "",
        "Some bold, italic, gone and code, a",
        "link (http://a.b/c), http://d.e,",
        "<b>HTML</b> and [bold]b[/bold].",
        "A second line.",
        "",
        "1. one",
        "2. two with words enough to wrap around",
        "   where the window has only forty",
        "   columns",
        "",
        "   • nested",
        "   • more",
        "10. ten",
        "",
        "• loose",
        "",
        "• list",
        "",
        "```python",
        "def f(x):",
        '        return "[red]" + x  # tab',
        "",
        "```",
        "",
        "after",
        "",
        "a    b",
        "──────",
        "1   22",
        "",
        "│ quoted",
        "│ lazily",
        "",
        "─" * 39,
        "",
        "indented code",
        "",
        "[1]: http://definition",
    ]


TABLE = """| Substance with a long name | molar mass in g/mol | found in |
|---|--:|---|
| carbon dioxide | 12,756 | the air of towns and in sparkling water |
| salt | 58 | the sea |
"""


@pytest.mark.parametrize("columns", [100, 60, 40, 30, 20])
def test_tables_break_headings_first_and_words_never(columns: int) -> None:
    rows = shown(stream([TABLE], columns), columns)
    for word in ("12,756", "dioxide", "sparkling", "towns"):
        assert any(word in row for row in rows), rows
    assert all(len(row) <= columns for row in rows)
    if columns == 100:  # the text is not wrapped to leave room for a heading
        assert any("the air of towns and in sparkling water" in row for row in rows)
    if columns == 20:
        assert "molar mass in g/mol: 58" in " ".join(rows)


@pytest.mark.parametrize(
    "formula",
    [
        r"\(a^2+b^2=c^2\)",
        r"$\int_0^1 x\,dx$",
        "$x_1 * y_1 * z_1$",
        r"$$\sum_{i}\, *a* $$",
        r"\[ \{x\} \]",
        r"a \( b",
        r"$\$$",
    ],
)
def test_formulas_stay_as_they_are(formula: str) -> None:
    r"""CommonMark alone makes `(` of `\(`, and emphasis of the stars."""
    assert shown(stream([f"so {formula} *here*"])) == [f"so {formula} here"]


def test_what_is_no_formula() -> None:
    assert shown(stream(["$5 and *that* is $10"])) == ["$5 and that is $10"]


@pytest.mark.parametrize("marks", ["$$ $$", r"\[ \]"])
def test_formulas_of_lines_are_neither_lists_nor_rules(marks: str) -> None:
    first, last = marks.split()
    block = f"{first}\n- \\alpha * x\n+ \\beta * y\n---\n{last}"
    rows = shown(stream(list(f"So\n{block}\nis *it*.")))
    assert [row for row in rows if row] == ["So", *block.split("\n"), "is it."]


def test_styles() -> None:
    screen = Screen(80, 50)
    feed(screen, stream(["# Head\n\n**b** *i* `c`\n\n```python\ndef f(): pass\n```\n"]))
    head, text, code = (screen.buffer[row] for row in (0, 2, 5))
    assert head[0].bold and head[0].underscore
    assert text[0].bold and text[2].italics and text[4].fg == "magenta"
    assert code[0].fg == "magenta" and code[4].bold


@pytest.mark.parametrize("columns", [40, 80])
def test_where_the_reply_is_split_makes_no_difference(columns: int) -> None:
    """At every byte: what is not yet a whole character waits in the detokenizer, so at every character here."""
    whole = shown(stream([SAMPLE], columns), columns)
    assert shown(stream(list(SAMPLE), columns), columns) == whole
    for i in range(0, len(SAMPLE), 29):
        assert shown(stream([SAMPLE[:i], SAMPLE[i:]], columns), columns) == whole


def test_a_small_window_shows_the_same_where_each_block_fits() -> None:
    assert shown(stream(list(SAMPLE), 60, 12), 60, 12) == shown(stream([SAMPLE], 60), 60)


def test_a_block_taller_than_the_window_stays_as_it_was_typed_and_is_not_repeated() -> None:
    words = " ".join(f"word{i}" for i in range(200))
    lines = shown(stream([*f"first\n\n{words}\n\n**last**\n"], 40, 8), 40, 8)
    assert " ".join(lines).split() == ["first", *words.split(), "last"]
    items = "".join(f"- **item{i}**\n" for i in range(50))
    assert shown(stream([*items], 40, 8), 40, 8) == [f"• item{i}" for i in range(50)]
    table = "|a|b|\n|-|-|\n" + "".join(f"|{i}|x|\n" for i in range(30)) + "\nend\n"
    assert [line for line in shown(stream([*table], 40, 8), 40, 8) if line][-2:] == ["|29|x|", "end"]


def test_a_reply_goes_on_inside_its_last_block() -> None:
    before, after = "gone\n\n```python\nx = 1\ny", " = 2\n```\nend **now**"
    assert shown(stream([after], before=before)) == ["y = 2", "```", "", "end now"]
    assert shown(stream([" on"], before="gone\n\nit goes")) == ["it goes on"]


def test_a_window_that_changes_its_size_loses_and_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    size = [60, 20]  # pyte has its own idea of fewer rows, so only the width changes
    monkeypatch.setattr(MarkdownRenderer, "_size", lambda self: tuple(size))
    out = Tty()
    screen = Screen(*size)
    renderer = MarkdownRenderer(out)
    words = [f"word{i}" for i in range(300)]
    for i, word in enumerate(words):
        if i % 50 == 25:
            size[0] = 40 + i % 37
            screen.resize(size[1], size[0])
        out.truncate(0)
        out.seek(0)
        renderer.delta(Delta(word + ("\n\n" if i % 20 == 19 else " "), None))
        feed(screen, out.getvalue())
    lines = [*screen.scrolled, *(line.rstrip() for line in screen.display)]
    found = " ".join(lines).split()
    # pyte cuts the lines that are there when it gets narrower.
    assert [word for word in found if word in words] == [word for word in words if word in found]
    assert found[-1] == "word299" and len(found) > 250


def test_right_to_left_text_stays_in_its_order() -> None:
    text = "مَرْحَبًا بِالعالَم، هذا **نص** طويل بما يكفي ليلتف على أكثر من سطر. " * 3
    lines = shown(stream(list(text), 40), 40)
    assert " ".join(lines).split() == text.replace("**", "").split()
    assert len(lines) > 2 and all(not line[:1].strip() or not is_mark(line[0]) for line in lines)


def is_mark(char: str) -> bool:
    import unicodedata

    return bool(unicodedata.combining(char))


def test_wide_characters_and_sequences_keep_the_rows_straight() -> None:
    text = "漢字かな交じり文 👩‍👩‍👧‍👦 flag 🇩🇪 e\u0301 " * 6
    for part in (list(text), [text]):
        lines = shown(stream([*part, "\n\n", "after\n"], 30), 30)
        assert lines[-2:] == ["", "after"] and lines[0].startswith("漢字かな")


def test_bytes_grow_with_the_reply() -> None:
    def cost(times: int) -> int:
        block = "Words **and** more `words`.\n\n- item\n- item\n\n```python\n" + "x = 'y'  # z\n" * 40 + "```\n\n"
        parts = re.findall(r"\s?\S+|\s", block * times)
        return len(stream(parts, 80, 24))

    assert 3.8 < cost(4) / cost(1) < 4.2


def test_one_long_block_costs_no_square() -> None:
    def cost(lines: int) -> int:
        return len(stream([f"line {i} of one paragraph\n" for i in range(lines)], 80, 24))

    assert cost(800) < 4.5 * cost(200)


OBEYED = (
    "\x1b]0;title\x07|\x1b]52;c;aGk=\x07|\x1b[2J|\x1b[?25l|\x1bc|\x9b31m|\x9d0;x\x9c|\x08|\r|\x00|\x7f|\x0c|\x0b".split(
        "|"
    )
)
MARKS = "&#13; &#27; &#155; &#8; `\x1b[1m` ```\x1b\n ``` [bold] [/] ![i](x) [t](\x1b) ** _ ~~ <b> \\ ---\n ===".split(
    " "
)
STARTS = ["# ", "- ", "1. ", "> ", "    ", "\t", "\n", "\n\n", "|a|b|\n|-|-|\n|"]
WORDS = ["word ", "عربي ", "e\u0301", "👩\u200d👧", "漢", "\u202e", "\u2028"]
HOSTILE = st.lists(st.sampled_from([*OBEYED, *MARKS, *STARTS, *WORDS]) | st.text(max_size=4), max_size=25)


def check_safety(text: str, at: int) -> None:
    sent = stream([text[:at], text[at:]], 40, 10)
    rest = OURS.sub("", sent)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", rest), repr(rest)
    screen = Screen(40, 10)
    feed(screen, sent)
    assert not screen.title and not screen.cursor.hidden and screen.cursor.x == 0


@settings(max_examples=120)
@given(st.data())
def test_a_reply_is_never_obeyed(data: st.DataObject) -> None:
    text = "".join(data.draw(HOSTILE))
    check_safety(text, data.draw(st.integers(0, len(text))))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@settings(max_examples=5000)
@given(HOSTILE)
def test_a_reply_is_never_obeyed_wherever_it_is_split(parts: list[str]) -> None:
    text = "".join(parts)
    for at in range(len(text) + 1):
        check_safety(text, at)


BRACKETS = st.lists(
    st.sampled_from(
        ["[bold]", "[/bold]", "[red on blue]", "[/]", "[link=file:///x]", "[@click=x]", "[[", "]]", "\\[", ":smile:"]
    )
    | st.text("abc[]=/#. ", max_size=6),
    min_size=1,
    max_size=8,
)


def check_brackets(parts: list[str]) -> None:
    text = "x" + " ".join(" ".join(parts).split()).replace("\\", "")
    for kind in (f"{text}\n", f"# {text}\n", f"- {text}\n", f"```\n{text}\n```\n", f"`{text}`"):
        found = "".join(shown(stream([kind], 200), 200, 8))
        assert text.rstrip("# ") in found, (kind, found)


@settings(max_examples=60)
@given(BRACKETS)
def test_brackets_are_text(parts: list[str]) -> None:
    check_brackets(parts)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@settings(max_examples=5000)
@given(BRACKETS)
def test_brackets_are_text_at_length(parts: list[str]) -> None:
    check_brackets(parts)


@pytest.mark.parametrize(
    "variables, suits",
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({}, False)],
)
def test_where_markdown_is_shown(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], suits: bool) -> None:
    monkeypatch.delenv("TERM", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert markdown.suits(Tty()) is suits
    assert not markdown.suits(io.StringIO())


def test_no_color_leaves_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert os.environ["NO_COLOR"]
    sent = stream(["**b** `c`\n\n```python\ndef f(): pass\n```\n"])
    assert "\x1b[1m" in sent and not re.search(r"\x1b\[(?:\d+;)*(?:3\d|9\d)", sent)
