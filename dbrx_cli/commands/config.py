"""`dbrx config`: the settings file: where it is, what is in force and why, changing it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dbrx_cli.complete import profile_names, setting_keys
from dbrx_cli.options import OutputOptions, check_range, default_command, switch
from dbrx_cli.output import say, say_json, to_json
from dbrx_cli.report import Report
from model.foreign_text import on_one_line

app = typer.Typer(
    cls=default_command("show"), help="Settings: show them and where each comes from, set and unset them."
)

Key = Annotated[
    str,
    typer.Argument(metavar="KEY", help="The long flag, with _ for -.", show_default=False, autocompletion=setting_keys),
]
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="NAME", help="In this profile.", show_default=False, autocompletion=profile_names
    ),
]

Quiet = Annotated[bool, switch("-q", "--quiet", help="Errors only on stderr.")]


@app.command("path")
def path() -> None:
    """Print where the settings file is, or would be.

    dbrx config path
    """
    from dbrx_cli.settings_file import config_path

    say(str(config_path()))


@app.command("show")
def show(
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            envvar="DBRX_PROFILE",
            show_envvar=False,
            metavar="NAME",
            help="As with this profile.",
            show_default=False,
            autocompletion=profile_names,
        ),
    ] = None,
    json_output: Annotated[bool, switch("--json", help="Print JSON.")] = False,
) -> None:
    """Show each setting, its value, and where that comes from. A flag on the command line goes before all of them.

    dbrx config show
    """
    from dbrx_cli.precedence import in_force
    from dbrx_cli.settings import SETTINGS

    found = in_force(profile)
    rows = [
        (key, found[key].value, found[key].origin) if key in found else (key, setting.default, "default")
        for key, setting in SETTINGS.items()
    ]
    if json_output:
        values = {key: {"value": value, "origin": origin} for key, value, origin in rows}
        say_json(values, indent=2)
    elif sys.stdout.isatty():
        _print_table(rows)
    else:
        say("".join(f"{key}\t{_spelled(value)}\t{origin}\n" for key, value, origin in rows), end="")


@app.command("get")
def get(key: Key, *, profile: Profile = None) -> None:
    """Print a setting's value; nothing if it is left open.

    dbrx config get model
    """
    from dbrx_cli.precedence import in_force
    from dbrx_cli.settings import setting

    known, found = setting(key), in_force(profile)
    say(_spelled(found[key].value if key in found else known.default))


@app.command("edit")
def edit() -> None:
    """Open the settings file in $VISUAL or $EDITOR. What is wrong with it afterwards is told, and nothing changed.

    dbrx config edit
    """
    from dbrx_cli.settings_file import edited

    _tell(edited(), quiet=False)


@app.command("set", context_settings={"ignore_unknown_options": True})  # numbers below zero
def set_(
    key: Key,
    values: Annotated[list[str], typer.Argument(metavar="VALUE", help="Its value.", show_default=False)],
    *,
    profile: Profile = None,
    quiet: Quiet = False,
) -> None:
    """Set a key in the settings file. Comments stay; a value that no command would take is refused.

    dbrx config set model demo

    dbrx config set temperature 0.2 --profile precise
    """
    from dbrx_cli.settings import setting
    from dbrx_cli.settings_file import change, read_value

    chosen = setting(key)
    value = read_value(chosen, values)
    check_range(chosen, value)
    _tell(change(chosen, value, profile), quiet)


@app.command("unset")
def unset(key: Key, *, profile: Profile = None, quiet: Quiet = False) -> None:
    """Remove a key from the settings file.

    dbrx config unset model
    """
    from dbrx_cli.settings import setting
    from dbrx_cli.settings_file import change

    _tell(change(setting(key), None, profile), quiet)


def _tell(file: Path, quiet: bool) -> None:
    Report(OutputOptions(quiet=quiet)).notice(f"wrote {file}")


def _spelled(value: Any) -> str:
    """As the file spells it; nothing for what is left open."""
    if value is None:
        return ""
    return to_json(value) if isinstance(value, (bool, list)) else str(value)


def _print_table(rows: list[tuple[str, Any, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from dbrx_cli.render.console import PlainConsole

    table = Table(box=None, pad_edge=False)
    for title in ("setting", "value", "from"):
        table.add_column(title, overflow="fold", no_wrap=title == "setting")
    for key, value, origin in rows:
        style = "dim" if origin == "default" else ""
        table.add_row(*(Text(on_one_line(text), style) for text in (key, _spelled(value), origin)))
    PlainConsole().print(table)
