"""`dbrx tokenize`: text to ids and back, without loading a network."""

import json
import re
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbrx_cli.options import DEFAULT_MODEL, DEMOS, ModelOptions, OutputOptions, WhichModel, switch, takes
from dbrx_cli.output import say, say_json
from dbrx_cli.report import Report
from dbrx_cli.stdin import InputErrors, check_argument, read_piped
from model.errors import InputError, ModelError
from model.messages import Message

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

STDIN = "-"


@takes(model=WhichModel, output=OutputOptions)
def tokenize(
    text: Annotated[
        str | None,
        typer.Argument(help="The text, or ids with --decode; without it, or as `-`, stdin.", show_default=False),
    ] = None,
    *,
    count: Annotated[bool, switch("--count", help="Print only the number of tokens.")] = False,
    decode: Annotated[bool, switch("--decode", help="Turn ids into text.")] = False,
    chat: Annotated[bool, switch("--chat", help="As a message of a chat, with the template around it.")] = False,
    json_output: Annotated[bool, switch("--json", help="Print one JSON object with the span of each token.")] = False,
    input_errors: Annotated[
        InputErrors, typer.Option("--input-errors", help="What to do with stdin that is not UTF-8.")
    ] = "strict",
    model: WhichModel,
    output: OutputOptions,
) -> None:
    """Show the tokens of a text: a table on a terminal, an id a line in a pipe.

    dbrx tokenize "Hello, world"

    dbrx tokenize --count < book.txt

    dbrx tokenize "Hello" | dbrx tokenize --decode
    """
    if decode and chat:
        raise InputError("--decode and --chat exclude each other", "choose one")
    given = _input(text, input_errors)
    tokenizer = _find_tokenizer(model, Report(output))
    ids = _ids_in(given, tokenizer) if decode else _encode(given, tokenizer, chat)
    if json_output:
        tokens = [asdict(piece) for piece in spans(tokenizer, ids)]
        say_json({"model": model.model, "count": len(ids), "tokens": tokens})
    elif count:
        say(str(len(ids)))
    elif decode:
        _print_text(b"".join(tokenizer.decode_bytes(i) for i in ids))
    elif sys.stdout.isatty():
        _print_table(spans(tokenizer, ids))
    else:
        say("".join(f"{i}\n" for i in ids), end="")


@dataclass(frozen=True)
class Span:
    """One token: `text` is None where its bytes are only a part of a character; offsets count bytes of UTF-8."""

    id: int
    bytes: str  # hexadecimal
    text: str | None
    start: int
    end: int
    special: bool


def spans(tokenizer: "Tokenizer", ids: list[int]) -> list[Span]:
    """Each token with its bytes and its place in the text that all of them make."""
    special = set(tokenizer.special_tokens.values())
    found, start = [], 0
    for token_id in ids:
        piece = tokenizer.decode_bytes(token_id)
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError:
            text = None
        found.append(Span(token_id, piece.hex(" "), text, start, start + len(piece), token_id in special))
        start += len(piece)
    return found


def _input(text: str | None, errors: InputErrors) -> str:
    """The argument, or stdin as it is: a line's end at its end is text like any other."""
    if text is not None and text != STDIN:
        return check_argument(text, "the text")
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise InputError("there is no text", 'type it (dbrx tokenize "..."), or pipe it to stdin')
    return read_piped(errors) or ""


def _find_tokenizer(model: WhichModel, report: Report) -> "Tokenizer":
    """The model's tokenizer; DBRX's own where no model was named. Of a Hub id only the tokenizer is fetched."""
    from dbrx_cli.engine.load import find_model
    from model.hub import resolve
    from model.tokenizer import PATTERNS, Tokenizer

    if model.model in DEMOS:
        return Tokenizer.from_source(find_model(ModelOptions(model=model.model), report))
    try:
        folder = resolve(model.model, revision=model.revision, patterns=PATTERNS, download=False)
    except ModelError:
        if model.model == DEFAULT_MODEL:
            from model.bpe import cl100k_vocabulary

            report.detail(f"{DEFAULT_MODEL} is not on this machine: its vocabulary is built in")
            return Tokenizer(cl100k_vocabulary())
        folder = resolve(model.model, revision=model.revision, patterns=PATTERNS)
    return Tokenizer.from_source(folder)


def _encode(text: str, tokenizer: "Tokenizer", chat: bool) -> list[int]:
    if not chat:
        return tokenizer.encode(text)
    return tokenizer.encode_segments(tokenizer.chat_template.segments([Message("user", text)]))


def _ids_in(text: str, tokenizer: "Tokenizer") -> list[int]:
    """Ids apart by blanks, lines or commas, also as a JSON list."""
    ids = []
    for word in re.split(r"[\s,]+", text.strip().removeprefix("[").removesuffix("]").strip()):
        if not word:
            continue
        if not re.fullmatch(r"[0-9]{1,10}", word):
            raise InputError(f"{word[:40]!r} is not a token id", "ids are whole numbers, such as '15339 11'")
        if int(word) >= len(tokenizer):
            raise InputError(f"there is no token {word}: the ids end at {len(tokenizer) - 1}")
        ids.append(int(word))
    return ids


def _print_text(data: bytes) -> None:
    """The bytes as they are, for a pipe; on a terminal as safe text and a line of its own."""
    if sys.stdout.isatty():
        say(data.decode("utf-8", "replace"))
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _print_table(tokens: list[Span]) -> None:
    from rich.table import Table
    from rich.text import Text

    from dbrx_cli.render.console import PlainConsole

    table = Table(box=None, pad_edge=False)
    table.add_column("id", justify="right", style="cyan", no_wrap=True)
    table.add_column("bytes", style="dim", overflow="fold")
    table.add_column("text", overflow="fold")
    whole = bytes.fromhex(" ".join(token.bytes for token in tokens))
    for token in tokens:
        shown = Text(token.text, "magenta") if token.special and token.text else _shown(token, whole)
        table.add_row(str(token.id), token.bytes, shown)
    console = PlainConsole()
    console.print(table)
    console.print(f"{len(tokens)} token{'s' * (len(tokens) != 1)}")


def _shown(token: Span, whole: bytes) -> Any:
    """A token's text in quotes, with what cannot be seen escaped; a part of a character beside that character."""
    from rich.text import Text

    if token.text is not None:
        quoted = json.dumps(token.text, ensure_ascii=False)
        return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in quoted))
    start, end = token.start, token.end
    while start > 0 and whole[start] & 0xC0 == 0x80:
        start -= 1
    while end < len(whole) and whole[end] & 0xC0 == 0x80:
        end += 1
    return Text(f"part of {json.dumps(whole[start:end].decode('utf-8', 'replace'), ensure_ascii=False)}", "yellow")
