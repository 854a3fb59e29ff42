"""`dbrx doctor`: what is wrong here, and what to type."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dbrx_cli.options import OutputOptions, WhichModel, switch, takes
from dbrx_cli.output import room, say_json
from dbrx_cli.report import Report
from model.foreign_text import on_one_line

if TYPE_CHECKING:
    from rich.console import Console

    from dbrx_cli.doctor import Check

SIGNS = {"ok": ("green", "ok"), "note": ("dim", "note"), "warning": ("yellow", "WARN"), "problem": ("red", "FAIL")}


@takes(model=WhichModel, output=OutputOptions)
def doctor(
    *,
    json_output: Annotated[bool, switch("--json", help="Print one JSON object.")] = False,
    model: WhichModel,
    output: OutputOptions,
) -> None:
    """Examine this installation: packages, devices, caches, access to the model, and whether the numbers are right.

    dbrx doctor

    dbrx doctor -m org/name
    """
    checks: list[Check] = []
    with Report(output).status("examining"):
        from rich.text import Text

        from dbrx_cli.doctor import examine
        from dbrx_cli.render.console import PlainConsole

        console = PlainConsole()
        for check in examine(model):
            checks.append(check)
            if not json_output and not (output.quiet and check.state in ("ok", "note")):
                with room():
                    _print(console, check)
    code = next((check.exit_code for check in checks if check.state == "problem"), 0)
    if json_output:
        values = {"usable": code == 0, "exit_code": code, "checks": [asdict(check) for check in checks]}
        say_json(values, indent=2)
    elif not output.quiet:
        console.print(Text(verdict(checks), "bold"))
    if code:
        raise typer.Exit(code)


def verdict(checks: "list[Check]") -> str:
    """All of it in one sentence."""
    problems = [check.name for check in checks if check.state == "problem"]
    warnings = [check.name for check in checks if check.state == "warning"]
    if problems:
        return f"not usable as it is: {', '.join(problems)}; what to type stands above"
    return "usable" + (f"; worth a look: {', '.join(warnings)}" if warnings else ", and nothing is wrong")


def _print(console: "Console", check: "Check") -> None:
    """A line for the part, and one for what to type."""
    from rich.table import Table
    from rich.text import Text

    style, sign = SIGNS[check.state]
    line = Table.grid(padding=(0, 1))
    line.add_row(Text(f"{sign:4}", style), Text.assemble((check.name, "bold"), ": ", on_one_line(check.text)))
    if check.hint:
        line.add_row("", Text(f"-> {on_one_line(check.hint)}", "cyan"))
    console.print(line)
