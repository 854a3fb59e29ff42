"""`dbrx generate`: one prompt, one reply."""

from __future__ import annotations

from typing import Annotated

import typer

from dbrx_cli import options as opt
from dbrx_cli.engine import Request
from dbrx_cli.render import Renderer, show
from dbrx_cli.report import Report
from dbrx_cli.stdin import InputErrors, check_argument, read_piped
from model.errors import InputError
from model.messages import Message

STDIN = "-"


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; `-` reads it from stdin.", show_default=False)
    ] = None,
    system: Annotated[
        str | None, typer.Option("-s", "--system", metavar="TEXT", help="System message.", show_default=False)
    ] = None,
    no_system: Annotated[
        bool, typer.Option("--no-system", help="Without the checkpoint's default system message.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the text (base models).")] = False,
    input_errors: Annotated[
        InputErrors, typer.Option("--input-errors", help="What to do with stdin that is not UTF-8.")
    ] = "strict",
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
    no_stream: Annotated[
        bool, typer.Option("--no-stream", rich_help_panel="Output", help="Print the reply when it is complete.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", rich_help_panel="Output", help="Print one JSON object.")
    ] = False,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", rich_help_panel="Output", help="Print a JSON line an event.")
    ] = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Answer one prompt: from the argument, from stdin, or from both (stdin goes behind the argument).

    dbrx generate -m demo "Why is the sky blue?"

    git diff | dbrx generate -m demo "Write a commit message for this diff."
    """
    if json_output and jsonl:
        raise InputError("--json and --jsonl exclude each other", "choose one")
    if raw and (system is not None or no_system):
        raise InputError("--raw has no system message", "leave out -s and --no-system")
    text = _prompt(prompt, input_errors)
    sampling = opt.SamplingOptions(
        max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, frequency_penalty, presence_penalty, seed
    )
    where = opt.ModelOptions(model, revision, attn, dtype, device_map, max_memory, threads, context)
    report = Report(quiet, verbose)

    from dbrx_cli.engine.local import LocalEngine
    from dbrx_cli.render.jsonl import JsonLinesRenderer, JsonRenderer
    from dbrx_cli.render.plain import PlainRenderer

    engine = LocalEngine.load(where, report)
    request = Request(
        text if raw else _conversation(text, system, no_system),
        sampling.over(engine.defaults),
        tuple(check_argument(s, "--stop") for s in stop or ()),
    )
    renderer: Renderer
    if json_output:
        renderer = JsonRenderer()
    elif jsonl:
        renderer = JsonLinesRenderer(model)
    else:
        renderer = PlainRenderer(stream=not no_stream)
    done = show(engine.stream(request), renderer)
    report.detail(done.summary())
    if done.finish_reason == "interrupted":
        raise KeyboardInterrupt


def _prompt(prompt: str | None, errors: InputErrors) -> str:
    """Argument and stdin as one text, a blank line between them."""
    if prompt == STDIN:
        piped, prompt = read_piped(errors), None
    else:
        piped = read_piped(errors)
    parts = [check_argument(prompt, "the prompt")] if prompt is not None else []
    parts += [piped] if piped is not None else []
    if not any(part.strip() for part in parts):
        raise InputError("there is no prompt", 'type one (dbrx generate "..."), or pipe one to stdin')
    return "\n\n".join(parts)


def _conversation(text: str, system: str | None, no_system: bool) -> list[Message]:
    if system is not None and no_system:
        raise InputError("-s and --no-system exclude each other", "choose one")
    first = [Message("system", check_argument(system or "", "--system"))] if system is not None or no_system else []
    return [*first, Message("user", text)]
