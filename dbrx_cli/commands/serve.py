"""`dbrx serve`: an OpenAI-compatible server, by vLLM."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dbrx_cli.options import DtypeName, ModelOptions, OutputOptions, WhichModel, option, takes
from dbrx_cli.report import Report
from model.errors import InputError

EngineName = Literal["vllm"]
SERVER = "Server"


@takes(model=WhichModel, output=OutputOptions)
def serve(
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- FLAGS", help="Flags of vLLM's own, passed on.", show_default=False),
    ] = None,
    *,
    engine: Annotated[EngineName | None, typer.Option(help="What computes.", show_default=False)] = None,
    python: Annotated[
        str | None,
        option("--python", panel=SERVER, metavar="PATH", help="Python of vLLM's environment (default: this one)."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Devices that share each layer.")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(min=1, help="Groups of layers, one behind the other.")] = 1,
    dtype: Annotated[DtypeName, typer.Option(help="Of weights and activations; auto: as stored.")] = "auto",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and reply (default: the model's).", show_default=False)
    ] = None,
    model: WhichModel,
    output: OutputOptions,
) -> None:
    """Serve a model over HTTP in OpenAI's protocol, computed by vLLM. Clients need the key in DBRX_API_KEY, if set.

    dbrx serve --engine vllm -m ./dbrx-instruct --tensor-parallel-size 8
    """
    if engine is None:
        raise InputError(
            "this program has no server of its own yet", "--engine vllm starts vLLM's with DBRX (docs/scale.md)"
        )
    if more and not more[0].startswith("-"):
        raise InputError(f"{more[0]} is no flag of vLLM's", "-m names the model; flags of vLLM's own stand behind --")
    from dbrx_cli.engine.load import find_model
    from dbrx_cli.vllm_plugin import launch
    from model.config import DbrxConfig

    interpreter = shutil.which(python or sys.executable) or python or sys.executable
    launch.require_vllm(interpreter)
    name = Path(model.model).resolve().name if Path(model.model).exists() else model.model
    serving = launch.Serving(
        name, host, port, dtype, context, tensor_parallel_size, pipeline_parallel_size, tuple(more or ())
    )
    if not serving.headless:
        launch.require_free(host, port)
    report = Report(output)
    source = find_model(ModelOptions(model=model.model, revision=model.revision), report)
    launch.require_readable(source)
    launch.require_fitting(DbrxConfig.from_json(source / "config.json"), serving)
    words = launch.command(interpreter, source, launch.companions(source), serving)
    report.detail(" ".join(words))
    launch.become(words)
