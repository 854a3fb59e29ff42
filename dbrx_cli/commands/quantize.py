"""`dbrx quantize`: a checkpoint in fewer bits, made once."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dbrx_cli.options import ModelOptions, OutputOptions, SchemeName, switch, takes
from dbrx_cli.output import say, say_json
from dbrx_cli.quality import against_floats, in_words, read_ids
from dbrx_cli.report import Report
from model.errors import InputError
from model.quantization import SCHEMES

if TYPE_CHECKING:
    from model.calibration import Calibration
    from model.weights import Weights

Group = Literal["32", "128"]
HELD_OUT = 1024  # tokens at most at a text's end, and an eighth of it: for telling the quality


@takes(output=OutputOptions)
def quantize(
    source: Annotated[
        str, typer.Argument(help="A folder, a GGUF file, or a Hub id that is on this machine.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    *,
    to: Annotated[SchemeName, typer.Option("--to", help="Of the experts; attention and head become int8.")],
    group: Annotated[
        Group | None,
        typer.Option(
            "--group",
            help="Weights that share a range, in int4: 32 is better (default), 128 smaller.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="Fit the experts to what they read on this text, or to an importance matrix of llama.cpp.",
            show_default=False,
        ),
    ] = None,
    quality: Annotated[
        Path | None,
        typer.Option(
            "--quality",
            metavar="FILE",
            help="Compare with float32 on this text at the end (default: the last part of --calibrate's).",
            show_default=False,
        ),
    ] = None,
    json_output: Annotated[bool, switch("--json", help="Print one JSON object.")] = False,
    output: OutputOptions,
) -> None:
    """Write a model in few bits. It loads as it is; an interrupted run is taken up by the same command.

    dbrx quantize databricks/dbrx-instruct ./dbrx-int4 --to int4 --group 128

    dbrx quantize databricks/dbrx-instruct ./dbrx-int4 --to int4 --calibrate essays.txt
    """
    if calibrate is not None:
        _require("--calibrate", to, [name for name, scheme in SCHEMES.items() if scheme.groups])
    if group is not None:
        _require(f"--group {group}", to, [name for name, scheme in SCHEMES.items() if int(group) in scheme.groups])
    report = Report(output)
    with report.status(f"opening {source}"):
        from dbrx_cli.engine.damage import damage_named
        from dbrx_cli.engine.load import find_model
        from model.formats import open_weights
        from model.formats.write_checkpoint import companions
        from model.formats.write_quantized import Writer

        folder = find_model(ModelOptions(model=source), report)
        ids = read_ids(quality, folder)[:HELD_OUT] if quality is not None else None
    with open_weights(folder) as weights, damage_named(folder), report.bar(f"Quantizing to {to}") as advance:
        finish = companions(folder, weights.config.vocab_size)
        calibration: Calibration | None = None
        if calibrate is not None:
            calibration, held_out = _calibration(weights, folder, calibrate)
            ids = ids or held_out
        Writer(weights, out, to, int(group) if group else None, calibration).write(finish, advance)
    compared = against_floats(folder, out, ModelOptions(), report, ids) if ids else None
    if json_output:
        told: dict[str, Any] = {"folder": str(out)}
        say_json(told | ({"quality": asdict(compared)} if compared else {}))
        return
    if compared:
        report.notice(in_words(compared))
    say(str(out))


def _require(flag: str, to: str, fitting: list[str]) -> None:
    if to not in fitting:
        raise InputError(f"{flag} is for --to {', '.join(fitting)}", "leave it out")


def _calibration(weights: "Weights", folder: Path, file: Path) -> "tuple[Calibration, list[int] | None]":
    """From a text, less the part that is held out to measure on; or from an importance matrix, which has none."""
    from model.calibration import ImatrixCalibration, TextCalibration
    from model.formats.imatrix import is_importance_matrix

    if is_importance_matrix(file):
        return ImatrixCalibration(weights, file), None
    ids = read_ids(file, folder)
    held = min(HELD_OUT, len(ids) // 8)
    return TextCalibration(weights, ids[: len(ids) - held]), ids[len(ids) - held :] if held > 1 else None
