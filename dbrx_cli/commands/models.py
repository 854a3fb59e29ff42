"""`dbrx models`: which models are on this machine, where, and how to be rid of one."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbrx_cli.options import DEMOS, ModelOptions, OutputOptions, default_command, switch, takes
from dbrx_cli.output import say, say_json, tell_lines
from dbrx_cli.report import Report
from model.errors import DbrxError, InputError, ModelError
from model.foreign_text import on_one_line

if TYPE_CHECKING:
    from model.hub.inventory import CachedModel

BECOMES = {"float32": 4, "bfloat16": 2, "float16": 2}  # times smaller, as int8
MOST = 0.9  # of the memory, for weights
WIDE = 90  # columns of a terminal that show where a model lies
NARROW = 50  # columns that show its form beside its speed
SHORTEST = 7  # characters of a commit that stand for it, as git shows it

app = typer.Typer(
    cls=default_command("list"),
    help="Models on this machine: list them, print a folder, remove one.",
    rich_markup_mode="markdown",
)

Name = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hub id (org/name), `demo` or `demo-moe`.", show_default=False)
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit.", show_default=False)
]


@app.command("list")
def list_models(
    json_output: Annotated[bool, switch("--json", help="Print a JSON array.")] = False,
    speed: Annotated[
        bool, switch("--speed", help="Measure this machine's kernels, and predict tokens a second.")
    ] = False,
) -> None:
    """List the DBRX models in the Hub's cache, those of ollama, LM Studio and llama.cpp, and the demo models.

    Folders of your own are not searched for.

    dbrx models list

    dbrx models list --speed
    """
    _list(json_output, speed)


@app.command("path")
def path(name: Name, revision: Revision = None) -> None:
    """Print the folder of a model that is on this machine and complete.

    dbrx models path demo
    """
    say(str(find_folder(name, revision)))


@app.command("remove")
@takes(output=OutputOptions)
def remove(
    name: Name,
    *,
    revision: Revision = None,
    yes: Annotated[bool, switch("-y", "--yes", help="Do not ask.")] = False,
    output: OutputOptions,
) -> None:
    """Remove a model from the cache: all its revisions, or one.

    dbrx models remove org/name
    """
    from model.hub.inventory import freed_bytes, remove_paths

    paths, what = _to_remove(name, revision)
    size = _size(freed_bytes(paths))
    if not yes:
        _ask(f"Remove {what}, {size}?")
    remove_paths(paths)
    Report(output).notice(f"removed {what}, {size} freed")


def _list(json_output: bool = False, speed: bool = False) -> None:
    from model.formats.locate import elsewhere
    from model.hub.inventory import inventory

    rows = [_row(model) for model in inventory()]
    cached = [row["path"] for row in rows]  # LLAMA_CACHE may name the Hub's cache, or have a layout like it
    rows += [_elsewhere(*each) for each in elsewhere() if not any(map(each[1].is_relative_to, cached))]
    rows += [demo for name in DEMOS if (demo := _demo(name))]
    for row in rows:
        row["form"] = _form(row)
        row["fits"] = _fits(row) if row["complete"] else None
        if speed:
            row["tokens_per_s"] = _predicted(row)
    if json_output:
        say_json(rows, indent=2)
    elif sys.stdout.isatty():
        _print_table(rows)
    else:
        for row in rows:
            state = "complete" if row["complete"] else "incomplete"
            columns = [row["name"], row["revision"] or "", row["bytes"], state, row["last_used"] or "", row["path"]]
            columns += [f"{row['tokens_per_s'] or 0:.2g}"] if speed else []
            say("\t".join(map(str, columns)))


def _row(model: "CachedModel") -> dict[str, Any]:
    return {
        "name": model.name,
        "revision": model.commit,
        "refs": list(model.refs),
        "bytes": model.nbytes,
        "complete": model.complete,
        "format": "gguf" if model.gguf else "safetensors",
        "missing": list(model.missing),
        "last_used": _iso(model.last_used),
        "path": str(model.folder),
    }


def _elsewhere(name: str, model: Path) -> dict[str, Any]:
    """A GGUF model that another program keeps, by what `-m` takes for it."""
    from model.formats.locate import missing_parts, parts_of

    files = [file.stat() for file in parts_of(model) if file.is_file()]
    missing = [file.name for file in missing_parts([model])]
    return {
        "name": name,
        "revision": None,
        "refs": [],
        "bytes": sum(file.st_size for file in files),
        "complete": not missing,
        "format": "gguf",
        "missing": missing,
        "last_used": _iso(max((file.st_atime for file in files), default=None)),
        "path": str(model),
    }


def _form(row: dict[str, Any]) -> str:
    """In what numbers the files hold the weights."""
    from model.safetensors_file import read_json

    if row["format"] == "gguf":
        return "GGUF"
    try:
        config = read_json(Path(row["path"]) / "config.json")
    except (DbrxError, OSError):
        return "?"
    quantized = config.get("quantization_config") or config.get("quantization") or {}
    named = quantized.get("kind") or quantized.get("quant_method") if isinstance(quantized, dict) else None
    return str(named or config.get("torch_dtype") or config.get("dtype") or "?")


def _fits(row: dict[str, Any]) -> bool:
    """Whether the weights find room in this machine's memory, floats as the int8 that they become there."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return bool(row["bytes"] / BECOMES.get(row["form"], 1) < MOST * memory)


def _predicted(row: dict[str, Any]) -> float | None:
    """Tokens a second, as `dbrx plan` has it; None where it knows none."""
    from dbrx_cli.planning import Question
    from model.speed import tokens_per_s

    if not row["complete"]:
        return None
    name = row["name"] if row["name"] in DEMOS else row["path"]
    with Report(OutputOptions()).status(f"measuring for {row['name']}"):
        try:
            question = Question.of(name, ModelOptions(model=name), None)
        except DbrxError:
            return None
        return question.predicted or tokens_per_s(question.plan)


def _demo(name: str) -> dict[str, Any] | None:
    """A demo model, if it was made."""
    from dbrx_cli.demo import demo_folder, is_complete

    folder = demo_folder(name)
    if not folder.is_dir():
        return None
    files = [file.stat() for file in folder.iterdir() if file.is_file()]
    return {
        "name": name,
        "revision": None,
        "refs": [],
        "bytes": sum(file.st_size for file in files),
        "complete": is_complete(name),
        "format": "safetensors",
        "missing": [],
        "last_used": _iso(max((file.st_atime for file in files), default=None)),
        "path": str(folder),
    }


def find_folder(name: str, revision: str | None) -> Path:
    """Where a complete model lies on this machine; `ModelError` if it does not."""
    from dbrx_cli.engine.load import find_model

    if name in DEMOS:
        demo = _demo(name)
        if demo is None or not demo["complete"]:
            raise ModelError("the demo model is not on this machine", f"to fetch it: dbrx chat -m {name}")
        return Path(demo["path"])
    return find_model(ModelOptions(model=name, revision=revision), Report(OutputOptions(quiet=True)))


def _to_remove(name: str, revision: str | None) -> tuple[list[Path], str]:
    """What is deleted, and how it is called."""
    from model.formats.ollama import PREFIX
    from model.hub.inventory import inventory, removal
    from model.hub.plan import check_revision

    check_revision(revision)
    if name in DEMOS:
        if revision is not None:
            raise InputError("the demo model has no revisions", "leave out --revision")
        if (demo := _demo(name)) is None:
            raise ModelError("the demo model is not on this machine")
        return [Path(demo["path"])], f"the model {name}"
    if name.startswith((".", "/", "~")):
        raise InputError(f"{name} is outside the cache", "remove it yourself")
    if name.startswith(PREFIX):
        raise InputError(f"{name} is in ollama's store", f"ollama rm {name.removeprefix(PREFIX)}")
    cached = [model for model in inventory() if model.name == name]
    if not cached:
        raise ModelError(f"no DBRX checkpoint {name} is in the cache", "`dbrx models` lists those that are")
    if revision is None:
        count = f" ({len(cached)} revisions)" if len(cached) > 1 else ""
        return removal(cached, all_revisions=True), f"{name}{count}"
    chosen = [m for m in cached if revision in m.refs] or [m for m in cached if _begins(m.commit, revision)]
    if len(chosen) != 1:
        raise ModelError(f"{name} has no revision {revision} in the cache", "`dbrx models` lists those that it has")
    return removal(chosen, all_revisions=False), f"{name} at {(chosen[0].commit or '')[:12]}"


def _begins(commit: str | None, revision: str) -> bool:
    """Whether a revision is a commit, or enough of its beginning to mean that one and no other."""
    return len(revision) >= SHORTEST and (commit or "").startswith(revision)


def _ask(question: str) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise InputError("there is no terminal to ask on", "to remove it unasked: --yes")
    tell_lines(f"{on_one_line(question)} [y/N] ", end="")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise DbrxError("nothing was removed")


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from dbrx_cli.render.console import PlainConsole

    console = PlainConsole()
    if not rows:
        console.print("No models yet. To fetch one: dbrx download org/name; to try the demo: dbrx chat -m demo")
        return
    wide, speed = console.width >= WIDE, "tokens_per_s" in rows[0]
    formed = not speed or console.width >= NARROW
    table = Table(box=None, pad_edge=False)
    titles = ["model", "size", *(["form"] if formed else []), "here", *(["tokens/s"] if speed else [])]
    for title in (*titles, *(("revision", "place") if wide else ())):
        right = title in ("size", "tokens/s")
        table.add_column(
            title, justify="right" if right else "left", overflow="fold", no_wrap=title not in ("model", "place")
        )
    for row in rows:
        refs = f" ({', '.join(row['refs'])})" if row["refs"] else ""
        state = Text("in memory" if row["fits"] else "from disk", "green" if row["fits"] else "yellow")
        cells = [
            Text(on_one_line(row["name"]), "bold"),
            Text(_size(row["bytes"])),
            *([Text(on_one_line(row["form"]))] if formed else []),
            state if row["complete"] else Text(_lacks(row), "red"),
        ]
        if speed:
            cells.append(Text(f"{row['tokens_per_s']:.2g}" if row["tokens_per_s"] else "?"))
        if wide:
            cells += [Text(f"{(row['revision'] or '')[:7]}{on_one_line(refs)}"), Text(_place(row["path"]))]
        table.add_row(*cells)
    console.print(table)


def _place(path: str) -> str:
    """The folder, or the Hub's cache, whose own folders are long; `dbrx models path` tells them."""
    home = str(Path.home())
    shown = path.partition("/models--")[0]
    return on_one_line(f"~{shown.removeprefix(home)}" if shown.startswith(f"{home}/") else shown)


def _lacks(row: dict[str, Any]) -> str:
    missing = len(row["missing"])
    return f"{missing} file{'s' * (missing > 1)} missing" if missing else "incomplete"


def _iso(seconds: float | None) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds is not None else None


def _size(n_bytes: int) -> str:
    from model.hub.plan import readable

    return readable(n_bytes)
