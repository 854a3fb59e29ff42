"""`dbrx convert`: weights in any layout -> a checkpoint folder in Databricks' own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dbrx_cli.options import ModelOptions, OutputOptions, takes
from dbrx_cli.output import say
from dbrx_cli.report import Report
from model.quantization import SCHEMES

if TYPE_CHECKING:
    To = str
else:
    To = Literal[("auto", "bfloat16", "float16", "float32", *SCHEMES)]


@takes(output=OutputOptions)
def convert(
    source: Annotated[
        str, typer.Argument(help="A GGUF file, a folder, or a Hub id that is on this machine.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    *,
    to: Annotated[
        To, typer.Option("--to", help="Type of the weights; auto: as stored, of quantized ones bfloat16.")
    ] = "auto",
    output: OutputOptions,
) -> None:
    """Write a model as a checkpoint that loads at once: from GGUF, or from a layout with separate experts.

    dbrx convert dbrx-Q4_K_M-00001-of-00002.gguf ./dbrx-instruct
    """
    report = Report(output)
    with report.status(f"opening {source}"):
        import torch

        from dbrx_cli.engine.damage import damage_named
        from dbrx_cli.engine.load import find_model
        from model.formats import open_weights
        from model.formats.write_checkpoint import companions, write_checkpoint
        from model.load_plan import Stored

        folder = find_model(ModelOptions(model=source), report)
    with open_weights(folder) as weights, damage_named(folder), report.bar("Converting") as advance:
        finish = companions(folder, weights.config.vocab_size)
        if to in SCHEMES:
            from model.formats.write_quantized import Writer

            Writer(weights, out, to).write(finish, advance)
        else:
            dtype = to if to != "auto" else Stored.of(weights).float_type or "bfloat16"
            write_checkpoint(weights, out, getattr(torch, dtype), finish, advance)
    say(str(out))
