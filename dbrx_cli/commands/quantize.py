"""`dbrx quantize`: a checkpoint in fewer bits, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dbrx_cli.options import ModelOptions, OutputOptions, SchemeName, takes
from dbrx_cli.output import say
from dbrx_cli.report import Report
from model.errors import InputError
from model.quantization import SCHEMES

Group = Literal["32", "128"]


@takes(output=OutputOptions)
def quantize(
    source: Annotated[
        str, typer.Argument(help="A folder, a GGUF file, or a Hub id that is on this machine.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    *,
    to: Annotated[SchemeName, typer.Option("--to", help="Of the experts; attention and head become int8.")],
    group: Annotated[
        Group, typer.Option("--group", help="Weights that share a range; 128 is smaller, 32 is better.")
    ] = "32",
    output: OutputOptions,
) -> None:
    """Write a model in few bits. It loads as it is; an interrupted run is taken up by the same command.

    dbrx quantize databricks/dbrx-instruct ./dbrx-int4 --to int4 --group 128
    """
    if not SCHEMES[to].groups and group != "32":
        with_groups = ", ".join(name for name, scheme in SCHEMES.items() if scheme.groups)
        raise InputError(f"--group is for --to {with_groups}", "leave it out")
    from dbrx_cli.engine.damage import damage_named
    from dbrx_cli.engine.load import find_model

    report = Report(output)
    folder = find_model(ModelOptions(model=source), report)
    from model.formats import open_weights
    from model.formats.write_checkpoint import companions
    from model.formats.write_quantized import Writer

    with open_weights(folder) as weights, damage_named(folder), report.bar(f"Quantizing to {to}") as advance:
        finish = companions(folder, weights.config.vocab_size)
        Writer(weights, out, to, int(group)).write(finish, advance)
    say(str(out))
