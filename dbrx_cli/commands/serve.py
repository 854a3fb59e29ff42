"""`dbrx serve`: an OpenAI-compatible server, by this program or by vLLM."""

import os
import shutil
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from dbrx_cli import running
from dbrx_cli.engine.choose import load_engine
from dbrx_cli.engine.follower import needs_one_process
from dbrx_cli.options import ModelOptions, OutputOptions, WhichModel, given_key, option, refuse_typed, takes
from dbrx_cli.report import Report
from dbrx_cli.server.options import ServerOptions, seconds_of
from model.errors import InputError

EngineName = Literal["dbrx", "vllm"]
VLLM = "With --engine vllm"


@dataclass(frozen=True)
class VllmOptions:
    """What vLLM alone can do."""

    python: Annotated[
        str | None,
        option("--python", panel=VLLM, metavar="PATH", help="Python of vLLM's environment (default: this one)."),
    ] = None
    tensor_parallel_size: Annotated[
        int,
        typer.Option("--tensor-parallel-size", rich_help_panel=VLLM, min=1, help="Devices that share each layer."),
    ] = 1
    pipeline_parallel_size: Annotated[
        int,
        typer.Option(
            "--pipeline-parallel-size", rich_help_panel=VLLM, min=1, help="Groups of layers, one behind the other."
        ),
    ] = 1


# vLLM has its own way with all else.
NOT_VLLMS = {field.name for group in (ServerOptions, ModelOptions) for field in fields(group)} - {
    "host", "port", "model", "revision", "dtype", "context",
}  # fmt: skip


@takes(server=ServerOptions, vllm=VllmOptions, model=ModelOptions, output=OutputOptions)
def serve(
    typed: typer.Context,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- FLAGS", help="Flags of vLLM's own, passed on.", show_default=False),
    ] = None,
    *,
    engine: Annotated[EngineName, typer.Option(help="What computes.")] = "dbrx",
    server: ServerOptions,
    vllm: VllmOptions,
    model: ModelOptions,
    output: OutputOptions,
) -> None:
    """Serve a model over HTTP in OpenAI's protocol. Clients need the key in DBRX_API_KEY, if it is set.

    dbrx serve -m demo

    dbrx serve --engine vllm -m ./dbrx-instruct --tensor-parallel-size 8
    """
    if engine == "vllm":
        refuse_typed(typed, NOT_VLLMS, "has no effect with --engine vllm", "flags of vLLM's own stand behind --")
        _become_vllm(more or [], server, vllm, model, output)
        return
    refuse_typed(typed, {field.name for field in fields(VllmOptions)}, "needs --engine vllm", "leave it out")
    if more:
        raise InputError(f"{more[0]} is no flag of this server's", "-m names the model")
    needs_one_process("dbrx serve")
    report = Report(output)
    if server.stop:
        given = typed.get_parameter_source("port")
        ended = running.stop(server.port if given is not None and given.name == "COMMANDLINE" else None)
        report.notice(f"{ended.name} at {ended.url} has ended")
        return
    sys.exit(_serve(server, model, report))


def _serve(options: ServerOptions, model: ModelOptions, report: Report) -> int:
    with report.status(f"starting {model.model}"):
        from dbrx_cli.addresses import listen
        from dbrx_cli.engine.load import find_model
        from dbrx_cli.server import background
        from dbrx_cli.server.run import Ends, serve, url_of
        from dbrx_cli.server.safety import Guard
        from dbrx_cli.server.service import Limits

    key = given_key()
    guard = Guard(options.host, key, options.allow_origin or ())
    limits = Limits(options.parallel, options.queue, seconds_of(options.timeout, "--timeout"))
    idle = None if options.idle_timeout is None else seconds_of(options.idle_timeout, "--idle-timeout")
    ends = Ends(seconds_of(options.drain, "--drain"), idle)
    with listen(options.host, options.port) as listening:
        find_model(model, report)  # what is not there is told at once
        port = listening.getsockname()[1]
        if options.background and (pid := background.leave_terminal(port)):
            report.notice(background.told(background.wait_until_ready(pid, port, report)))
            return 0

        name, *aliases = _names(model, options)
        settings = running.settings_of(vars(model))
        record = running.Record(os.getpid(), url_of(options.host, port), name, settings, key is not None)
        return serve(partial(load_engine, model, report), record, aliases, ends, listening, limits, guard, report)


def _names(model: WhichModel, options: ServerOptions) -> list[str]:
    """What clients may call the model, the name that is listed first: of a path its last part, of an id the id."""
    path = Path(model.model)
    first = path.resolve().name.removesuffix(".gguf") if path.exists() else model.model
    return [*dict.fromkeys([first, model.model, first.rpartition("/")[2], *(options.alias or ())])]


def _become_vllm(
    more: list[str], server: ServerOptions, vllm: VllmOptions, model: ModelOptions, output: OutputOptions
) -> None:
    if more and not more[0].startswith("-"):
        raise InputError(f"{more[0]} is no flag of vLLM's", "-m names the model; flags of vLLM's own stand behind --")
    from dbrx_cli.addresses import listen
    from dbrx_cli.engine.load import find_model
    from dbrx_cli.vllm_plugin import launch
    from model.config import DbrxConfig

    interpreter = shutil.which(vllm.python or sys.executable) or vllm.python or sys.executable
    launch.require_vllm(interpreter)
    name = Path(model.model).resolve().name if Path(model.model).exists() else model.model
    sizes = vllm.tensor_parallel_size, vllm.pipeline_parallel_size
    serving = launch.Serving(name, server.host, server.port, model.dtype, model.context, *sizes, tuple(more))
    if not serving.headless:
        listen(server.host, server.port).close()  # vLLM would say so in a traceback, after minutes
    report = Report(output)
    source = find_model(model, report)
    launch.require_readable(source)
    launch.require_fitting(DbrxConfig.from_json(source / "config.json"), serving)
    words = launch.command(interpreter, source, launch.companions(source), serving)
    report.detail(" ".join(words))
    launch.become(words)
