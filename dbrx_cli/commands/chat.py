"""`dbrx chat`: a conversation in the terminal, or a script of turns from a pipe."""

from __future__ import annotations

from typing import Annotated

import typer

from dbrx_cli import options as opt
from dbrx_cli.report import Report
from dbrx_cli.stdin import check_argument


def chat(
    system: Annotated[
        str | None, typer.Option("-s", "--system", metavar="TEXT", help="System message.", show_default=False)
    ] = None,
    model: opt.Model = opt.DEFAULT_MODEL,
    revision: opt.Revision = None,
    attn: opt.Attn = "auto",
    dtype: opt.Dtype = "auto",
    device_map: opt.DeviceMap = "auto",
    max_memory: opt.MaxMemory = None,
    threads: opt.Threads = None,
    context: opt.Context = None,
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    frequency_penalty: opt.FrequencyPenalty = None,
    presence_penalty: opt.PresencePenalty = None,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Talk with the model. Enter sends, Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands.

    dbrx chat -m demo

    dbrx chat -m demo < script.txt
    """
    sampling = opt.SamplingOptions(
        max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, frequency_penalty, presence_penalty, seed
    )
    where = opt.ModelOptions(model, revision, attn, dtype, device_map, max_memory, threads, context)
    report = Report(quiet, verbose)

    from dbrx_cli.conversation import Conversation
    from dbrx_cli.engine.local import LocalEngine
    from dbrx_cli.repl.loop import Repl

    engine = LocalEngine.load(where, report)
    Repl(
        engine,
        Conversation(None if system is None else check_argument(system, "--system")),
        sampling.over(engine.defaults),
        tuple(check_argument(text, "--stop") for text in stop or ()),
        report,
        name=model,
    ).run()
