"""`--extract`: the first code block, against markdown-it's reading of the whole reply, however the text is cut."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from dbrx_cli.engine import Delta, Done, Timings, Usage
from dbrx_cli.extract import CodeOnly, FirstBlock, Stream
from tests.cli import Cli


def reference(text: str) -> str | None:
    """The content of the first fenced code block by CommonMark, without the end of its last line."""
    fences = (token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence")
    return next((token.content.removesuffix("\n") for token in fences), None)


def assert_as_reference(text: str, cuts: list[int]) -> None:
    block, edges = FirstBlock(), [0, *sorted(cuts), len(text)]
    found = "".join(block.push(text[a:b]) for a, b in itertools.pairwise(edges)) + block.finish()
    expected = reference(text)
    assert block.found == (expected is not None)
    assert found == (expected or "")


CASES = {
    "plain": "Here:\n\n```python\nprint(1)\n```\nDone.",
    "nothing": "There is no code, only `ticks` and ```inline``` ones.",
    "two blocks": "```\none\n```\n\n```\ntwo\n```\n",
    "longer ticks around": "````md\n```\ninner\n```\n````\n",
    "tildes": "~~~sh\nls ``` ~~\n~~~\n",
    "closed by more": "```\na\n`````\nb\n",
    "not closed by the other": "```\n~~~\na\n```\n",
    "not closed by fewer": "````\n```\na",
    "never closed": "```js\nlet a\n\n",
    "never closed, cut off": "```js\nlet a = `x",
    "cut off inside the closing fence": "```\na\n``",
    "empty": "```\n```\n",
    "blank lines": "```\n\n\na\n\n\n```\n",
    "info with ticks is no fence": "``` a`b\nx\n",
    "spaces behind the closing fence": "```\na\n```  \nb",
    "text behind the closing fence": "```\na\n``` b\n```\n",
    "indented": "   ```\n   a\n     b\n  c\n   ```\n",
    "indented too far": "    ```\n    a\n",
    "in a list": "1. First:\n\n   ```sh\n   ls\n     -l\n   ```\n\n2. Second\n",
    "in a wide list": "10. Do\n\n    ```sh\n    ls\n    ```\n",
    "in a nested list": "- a\n  - b\n\n    ```py\n    x = 1\n    ```\n",
    "on the line of a list item": "- ```py\n  x = 1\n  ```\n",
    "line ends of Windows": "```py\r\nx\r\n```\r\n",
    "in a quote": "> Here:\n> ```py\n> x = 1\n>\n>   y\n> ```\n",
    "a quote that ends": "> ```\n> a\nb\n```\nc\n```\n",
    "a quote that a blank line ends": "> ```\n> a\n\n> b\n",
    "a quote in a list": "- > ```\n  > a\n  > ```\n",
    "a list in a quote": "> - ```\n>   a\n>   ```\n",
    "a tab in a list item": "-\t```\n\tx\n\t\ty\n\t```\n",
    "a tab behind a number": "1.\t```sh\n\tls\n\t```\n",
    "tabs in the block": "```\n\ta\n \tb\n  \t c\n```\n",
    "a list item that ends": "- ```\n  a\n\nb\n\n```\nc\n```\n",
    "a list item that the next one ends": "- ```\n  a\n- b\n",
    "a numbered item that a heading ends": "1. ```\n   a\n\n# b\n```\n",
    "HTML": "<div>\n```\na\n```\n</div>\n\n```\nb\n```\n",
    "HTML that a blank line ends": "<p>\n\n```\na\n```\n",
    "a comment": "<!--\n```\na\n```\n-->\n~~~\nb\n~~~\n",
    "a comment without an end": "<!-- \n\n```\na\n```\n",
    "a script": "<script>\n\n```\na\n```\n</script>\n```\nb\n```",
    "indented code behind a list": "- a\n\n\n      ```\n      b\n",
    "indented code behind a paragraph that ended": "a\n\n    ```\n    b\n    ```\n",
    "a lazy line is no fence": "> a\n```\nb\n```\n",
    "a fence ends a paragraph": "a\n```\nb\n```",
    "a definition of a link": "[a]: /b\n```\nc\n```\n",
    "a definition with ticks": "[a]: ``` \n\n```\nc\n```\n",
    "a heading underlined": "a\n===\n```\nb\n```\n",
    "blank lines with spaces": "```\n  \n\t\na\n   \n```\n",
    "blank lines at the end": "- ```\n  a\n\n\n",
    "quoted signs in the block": "```\n> a\n>\n>> ```\n```\n",
    "deep": "> 1. - > ~~~\n>      > a\n>      > ~~~\n",
    "old ends of lines": "a\r```\rb\r```\r",
    "a nul": "```\na\0b\n```\n",
    "unicode": "```\nn\u2028m\u000b\u0085 é 🎉\n```\n",
}


@pytest.mark.parametrize("name", CASES)
def test_as_markdown_it_reads_it(name: str) -> None:
    text, rng = CASES[name], random.Random(name)
    for cuts in ([], list(range(len(text))), [rng.randrange(len(text)) for _ in range(3)]):
        assert_as_reference(text, cuts)


LINES = "```|````|```py| ```|   ```|~~~|~~~~|``|``` x`|a|  b|||# c|`d`|```  ".split("|")
AROUND = ["", "", "", "> ", ">", "- ", "-\t", "1. ", "  ", "   ", "    ", "\t", "> - ", ">\t", "<div>", "<!--"]
ENDS = ["\n", "\n", "\n", "\n", "\r\n", "\r"]


def test_any_lines() -> None:
    draw = random.Random(3)
    for round in range(600):
        lines = (draw.choice(AROUND) + draw.choice(LINES) + draw.choice(ENDS) for _ in range(draw.randrange(13)))
        text = "".join(lines)
        text = text if round % 2 else text.rstrip("\r\n")
        assert_as_reference(text, [draw.randrange(len(text) + 1) for _ in range(6)])


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    block = FirstBlock()
    assert [block.push(piece) for piece in ("Code:\n``", "`py\n", "x", " = ", "1\n", "`", "`y", "\n```\n", "more")] == [
        "", "", "x", " = ", "1", "", "\n``y", "", ""
    ]  # fmt: skip
    assert block.closed and block.finish() == ""


def done(text: str, reason: Any = "stop") -> Done:
    nothing = Timings(0, 0, 0, 0, 0)
    return Done(text, [1], reason, Usage(1, 0, 1), nothing, "m", None, "sdpa", "float32", "none", 0)


def reply(pieces: list[str], ended_at: list[int]) -> Stream:
    """A stream as an engine gives it; notes after how many pieces it was asked to end."""
    said = ""
    try:
        for i, piece in enumerate(pieces):
            said += piece
            yield Delta(piece, i)
    except KeyboardInterrupt:
        ended_at.append(i)
        yield Delta("(held back)", None)
        yield done(said + "(held back)", "interrupted")
        return
    yield done(said)


def test_the_reply_ends_with_the_block() -> None:
    ended_at: list[int] = []
    code = CodeOnly()
    *deltas, last = list(code.of(reply(["a\n```\n", "x\ny\n", "```\n", "and ", "so on"], ended_at)))
    assert ended_at == [2] and isinstance(last, Done)
    assert last.text == "x\ny" == "".join(d.text for d in deltas if isinstance(d, Delta))
    assert last.finish_reason == "stop" and last.token_ids == [1]
    assert code.reply is not None and code.reply.text == "a\n```\nx\ny\n```\n(held back)"


def test_ctrl_c_in_the_middle_keeps_what_came() -> None:
    ended_at: list[int] = []
    code = CodeOnly()
    stream = code.of(reply(["```\n", "x", "y", "z"], ended_at))
    assert [next(stream) for _ in range(2)] == [Delta("", 0), Delta("x", 1)]
    rest = [stream.throw(KeyboardInterrupt()), *stream]
    assert ended_at == [1] and isinstance(rest[-1], Done)
    assert rest[-1].finish_reason == "interrupted" and rest[-1].text == "x(held back)"


class Fixed:
    """An engine that says what it is told to."""

    name = "fixed"
    context = 1000

    def __init__(self, text: str) -> None:
        from model.sampling import SamplingParams

        self.defaults = SamplingParams()
        self.text = text

    def stream(self, request: Any) -> Iterator[Delta | Done]:
        yield from reply([self.text[i : i + 3] for i in range(0, len(self.text), 3)], [])


def test_the_command(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBRX_DATA", str(tmp_path / "data"))
    for text, code, out in (("Hi:\n```py\nx = 1\n```\nBye", 0, "x = 1\n"), ("no code", 1, "")):
        monkeypatch.setattr("dbrx_cli.commands.generate.open_engine", lambda *_, text=text: Fixed(text))
        for flags in ((), ("--no-stream",)):
            result = cli("generate", "-m", "demo", "-x", *flags, "hi")
            assert (result.code, result.out) == (code, out)
            assert result.err == "" if code == 0 else "no fenced code block" in result.fault
        assert "Hi:\n```py\nx = 1\n```" in cli("sessions", "show", "1").out  # as far as it went, whatever was shown
        answer = cli("generate", "-m", "demo", "-x", "--json", "hi").out
        assert (json.loads(answer)["text"] + "\n" if answer else "") == out
