"""`dbrx export`: any model -> a GGUF file for llama.cpp."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dbrx_cli.options import ModelOptions, OutputOptions, WhichModel, takes
from dbrx_cli.output import say
from dbrx_cli.quality import read_ids
from dbrx_cli.report import Report
from model.errors import InputError

if TYPE_CHECKING:
    from model.calibration import Importance
    from model.weights import Weights

Type = Literal["q8_0", "q6_k", "q5_k_m", "q5_k", "q4_k_m", "q4_k", "q4_1", "q4_0", "bf16", "f32"]


@takes(model=WhichModel, output=OutputOptions)
def export(
    out: Annotated[Path, typer.Argument(help="The file to write, NAME.gguf.", show_default=False)],
    *,
    kind: Annotated[Type, typer.Option("--type", help="Of the weights; norms and routers stay in f32.")] = "q8_0",
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="SIZE", help="Parts of at most this size (40GiB).", show_default=False),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="Fit K-quants of the experts to what they read on this text, or to an importance matrix of llama.cpp.",
            show_default=False,
        ),
    ] = None,
    model: WhichModel,
    output: OutputOptions,
) -> None:
    """Write a model as GGUF, for llama.cpp and the programs built on it.

    dbrx export dbrx.gguf --type q8_0 -m ./dbrx-instruct

    dbrx export dbrx.gguf --type q4_k_m --calibrate essays.txt -m ./dbrx-instruct
    """
    from model.machine import parse_size

    if out.suffix != ".gguf":
        raise InputError(f"{out} does not end in .gguf", f"name it {out}.gguf")
    if calibrate is not None and "_k" not in kind:
        raise InputError("--calibrate is for K-quants, --type q4_k_m and others", "leave it out")
    size = parse_size(split, "--split") if split is not None else None
    report = Report(output)
    with report.status(f"opening {model.model}"):
        from dbrx_cli.engine.damage import damage_named
        from dbrx_cli.engine.load import find_model
        from model.formats import open_weights
        from model.formats.write_gguf import write_gguf
        from model.tokenizer import AutoTokenizer

        source = find_model(ModelOptions(model=model.model, revision=model.revision), report)
        tokenizer = AutoTokenizer.from_pretrained(source)
    with open_weights(source) as weights, damage_named(source), report.bar("Writing") as advance:
        importance = _importance(weights, source, calibrate) if calibrate is not None else None
        files = write_gguf(weights, tokenizer, out, kind, size, importance, advance, report.notice)
    for file in files:
        say(str(file))


def _importance(weights: "Weights", source: Path, file: Path) -> "Importance":
    """Of a text, all of it; or what an importance matrix says."""
    from model.calibration import TextCalibration
    from model.formats.imatrix import ImportanceMatrix, is_importance_matrix

    if is_importance_matrix(file):
        return ImportanceMatrix(file, weights.config)
    return TextCalibration(weights, read_ids(file, source))
