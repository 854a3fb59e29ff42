"""`dbrx download`: a checkpoint from the Hub, resumable and checked."""

from pathlib import Path
from typing import Annotated

import typer

from dbrx_cli.options import OutputOptions, switch, takes
from dbrx_cli.output import say
from dbrx_cli.report import Report
from model.errors import InputError


@takes(output=OutputOptions)
def download(
    model: Annotated[str, typer.Argument(help="A Hub id (org/name).", show_default=False)],
    *,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="DIR", help="A plain folder instead of the Hub's cache.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, switch("--dry-run", help="Only say what would be fetched.")] = False,
    verify: Annotated[bool, switch("--verify", help="Check files that are here already, too.")] = False,
    output: OutputOptions,
) -> None:
    """Fetch a checkpoint. A download that was interrupted goes on where it stopped; every file is checked.

    dbrx download org/name --to ./dbrx-instruct
    """
    from dbrx_cli.transfer import ASKS, Transfer, print_plan
    from model import hub

    report = Report(output)
    if to == "":  # a variable that is not set; Path would take it for the current folder
        raise InputError("--to is empty", "name a folder: --to DIR")
    plain = None if to is None else Path(to)
    if dry_run:
        with report.status(ASKS):
            found = hub.plan_download(model, revision=revision, to=plain)
        print_plan(found)
        return
    with Transfer(report) as progress:
        folder = hub.download(model, revision=revision, to=plain, verify=verify, progress=progress)
    say(str(folder))
