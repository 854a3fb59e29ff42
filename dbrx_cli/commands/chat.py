"""`dbrx chat`: a conversation in the terminal, or a script of turns from a pipe."""

from __future__ import annotations

from typing import Annotated

import typer

from dbrx_cli.engine.choose import open_engine
from dbrx_cli.options import ModelOptions, OutputOptions, SamplingOptions, takes
from dbrx_cli.report import Report
from dbrx_cli.stdin import check_argument


@takes(model=ModelOptions, sampling=SamplingOptions, output=OutputOptions)
def chat(
    *,
    system: Annotated[
        str | None, typer.Option("-s", "--system", metavar="TEXT", help="System message.", show_default=False)
    ] = None,
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Talk with the model. Enter sends, Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands.

    dbrx chat -m demo

    dbrx chat -m demo < script.txt
    """
    from dbrx_cli.conversation import Conversation
    from dbrx_cli.repl.loop import Repl

    conversation = Conversation(None if system is None else check_argument(system, "--system"))
    report = Report(output)
    engine = open_engine(model, report)
    params = sampling.over(engine.defaults)
    Repl(engine, conversation, params, sampling.stop_strings, report, name=model.model).run()
