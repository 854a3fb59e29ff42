"""`dbrx sessions`: what was said before: list it, read it, search it, take it elsewhere, remove it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dbrx_cli.complete import session_names
from dbrx_cli.engine import Delta
from dbrx_cli.options import OutputOptions, default_command, switch, takes
from dbrx_cli.output import say, say_json, tell_lines
from dbrx_cli.private import refuse_present, write_private
from dbrx_cli.report import Report
from model.errors import DbrxError, InputError
from model.foreign_text import on_one_line

if TYPE_CHECKING:
    from dbrx_cli.store import Entry, Session, Store

app = typer.Typer(
    cls=default_command("list"), help="Conversations that were kept: list, show, search, export, rename, remove."
)

Kind = Literal["chat", "generate", "all"]
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="The name of a session, or its number.", show_default=False, autocompletion=session_names
    ),
]
Json = Annotated[bool, switch("--json", help="Print JSON.")]
Limit = Annotated[
    int | None, typer.Option("-n", "--limit", min=1, metavar="N", help="The newest N only.", show_default=False)
]
OnlyKind = Annotated[
    Kind | None,
    typer.Option("--kind", help="Of one command, or all; default: on a terminal chats, else all.", show_default=False),
]


@app.command("list")
@takes(output=OutputOptions)
def list_sessions(
    *, kind: OnlyKind = None, limit: Limit = None, json_output: Json = False, output: OutputOptions
) -> None:
    """List the sessions, newest first. In a pipe: number, name, time, command, model, messages and title, with tabs.

    dbrx sessions list

    dbrx sessions list --json
    """
    _list(kind, limit, json_output, Report(output))


def _list(kind: Kind | None, limit: int | None, json_output: bool, report: Report) -> None:
    kind = kind or ("chat" if sys.stdout.isatty() and not json_output else "all")
    with _store(report) as store:
        _print_entries([(entry, None) for entry in store.list(None if kind == "all" else kind, limit)], json_output)
        others = len(store.list("generate")) if kind == "chat" and limit is None else 0
    if others:
        report.notice(f"and {others} of dbrx generate: --kind all")


@app.command("search")
@takes(output=OutputOptions)
def search(
    words: Annotated[list[str], typer.Argument(metavar="WORDS", help="All of them must occur.", show_default=False)],
    *,
    json_output: Json = False,
    output: OutputOptions,
) -> None:
    """Find sessions by what was said: one message, the system message or the name holds every word.

    dbrx sessions search mixture experts
    """
    with _store(Report(output)) as store:
        found = store.search(" ".join(words))
    if not found:
        raise DbrxError("no session holds that")
    _print_entries(list(found), json_output)


@app.command("show")
@takes(output=OutputOptions)
def show(name: Name, *, json_output: Json = False, output: OutputOptions) -> None:
    """Print a session as Markdown; on a terminal as it was seen.

    dbrx sessions show 12
    """
    with _store(Report(output)) as store:
        text = _exported(store.find(name), "json" if json_output else "markdown")
    if not json_output:
        from dbrx_cli.render.markdown import MarkdownRenderer, suits

        if suits(sys.stdout):
            renderer = MarkdownRenderer()
            renderer.delta(Delta(text, None))
            renderer.broken()
            return
    say(text, end="")


@app.command("export")
@takes(output=OutputOptions)
def export(
    name: Name,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help=".md or .json; without it, stdout.", show_default=False)
    ] = None,
    *,
    json_output: Json = False,
    force: Annotated[bool, switch("--force", help="Write over a file that is there.")] = False,
    output: OutputOptions,
) -> None:
    """Write a session to a file, as Markdown or JSON. The file can be read by you alone.

    dbrx sessions export 12 talk.md

    dbrx sessions export 12 --json | jq .messages
    """
    report = Report(output)
    suffix = file.suffix.lower() if file else ""
    if suffix not in ("", ".md", ".markdown", ".json"):
        raise InputError(f"a session cannot be exported as {suffix}", "take a name that ends in .md or .json")
    with _store(report) as store:
        text = _exported(store.find(name), "json" if json_output or suffix == ".json" else "markdown")
    if file is None:
        say(text, end="")
        return
    if not force:
        refuse_present(file, "take another name, or --force")
    write_private(file, text, over=force)
    report.notice(f"wrote {file}")


@app.command("rename")
@takes(output=OutputOptions)
def rename(
    name: Name,
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.", show_default=False)],
    *,
    output: OutputOptions,
) -> None:
    """Give a session a name.

    dbrx sessions rename 12 experts
    """
    with _store(Report(output)) as store:
        store.rename(name, new)


@app.command("remove")
@takes(output=OutputOptions)
def remove(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAMES", help="Names or numbers.", show_default=False, autocompletion=session_names),
    ] = None,
    *,
    everything: Annotated[bool, switch("--all", help="All sessions.")] = False,
    yes: Annotated[bool, switch("-y", "--yes", help="Do not ask.")] = False,
    output: OutputOptions,
) -> None:
    """Remove sessions, and their words from the disk.

    dbrx sessions remove 12 13

    dbrx sessions remove --all
    """
    if bool(names) == everything:
        raise InputError("name the sessions to remove, or take --all", "see dbrx sessions list")
    from dbrx_cli.session_cache import drop_cache

    report = Report(output)
    with _store(report) as store:
        ids = [entry.id for entry in store.list()] if everything else [store.find(name).id for name in names or ()]
        ids = list(dict.fromkeys(ids))
        count = f"{len(ids)} session{'s' * (len(ids) != 1)}"
        if ids and not yes:
            _ask(f"Remove {count}?")
        for id in ids:
            store.remove(id)
            drop_cache(id)
    report.notice(f"removed {count}")


@contextmanager
def _store(report: Report) -> "Iterator[Store]":
    from dbrx_cli.store import Store

    with Store.open(notify=report.notice) as store:
        yield store


def _exported(session: "Session", form: Literal["json", "markdown"]) -> str:
    from dbrx_cli.store import export_json, export_markdown

    return export_json(session) if form == "json" else export_markdown(session)


def _ask(question: str) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise InputError("there is no terminal to ask on", "to remove unasked: --yes")
    tell_lines(f"{question} [y/N] ", end="")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise DbrxError("nothing was removed")


def _print_entries(found: "list[tuple[Entry, str | None]]", json_output: bool) -> None:
    """A list of sessions; in place of the title, where a search found its words."""
    if json_output:
        rows = [asdict(entry) | ({} if excerpt is None else {"excerpt": excerpt}) for entry, excerpt in found]
        say_json(rows, indent=2)
    elif sys.stdout.isatty():
        _print_table(found)
    else:
        for e, excerpt in found:
            columns = (e.id, e.name or "", e.updated, e.kind, e.model, e.turns, excerpt or e.title)
            say("\t".join(" ".join(str(column).split()) for column in columns))


def _print_table(found: "list[tuple[Entry, str | None]]") -> None:
    from rich.table import Table
    from rich.text import Text

    from dbrx_cli.render.console import PlainConsole

    console = PlainConsole()
    if not found:
        console.print("No sessions yet. A chat is kept from its first reply on: dbrx chat")
        return
    narrow = console.width < 70
    ids, models = max(len(str(entry.id)) for entry, _ in found), 0 if narrow else 24
    room = console.width - ids - models - (14 if narrow else 28)  # the other columns, and two cells between all
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("", "session", "last used") if narrow else ("", "session", "model", "messages", "last used"):
        table.add_column(title, justify="right" if title in ("", "messages") else "left", no_wrap=True)
    for entry, excerpt in found:
        text = Text(on_one_line(entry.name or ""), "bold")
        if shown := excerpt or entry.title:
            text.append(
                "  " * bool(text) + on_one_line(shown), "not bold dim" if entry.name and not excerpt else "not bold"
            )
        text.truncate(max(room, 8), overflow="ellipsis")
        model = Text(on_one_line(entry.model))
        model.truncate(24, overflow="ellipsis")
        details = [] if narrow else [model, Text(str(entry.turns))]
        table.add_row(Text(str(entry.id)), text, *details, Text(_when(entry.updated)))
    console.print(table)


def _when(time: str) -> str:
    """A UTC time in the user's own zone: today only the hour."""
    local = datetime.fromisoformat(time).astimezone()
    return f"{local:%H:%M}" if local.date() == datetime.now().date() else f"{local:%Y-%m-%d}"
