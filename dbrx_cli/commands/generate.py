"""`dbrx generate`: one prompt, one reply."""

from __future__ import annotations

from typing import Annotated

import typer

from dbrx_cli.engine import Request
from dbrx_cli.engine.choose import open_engine
from dbrx_cli.options import OUTPUT, ModelOptions, OutputOptions, SamplingOptions, switch, takes
from dbrx_cli.render import Renderer, show
from dbrx_cli.report import Report
from dbrx_cli.stdin import InputErrors, check_argument, read_piped
from model.errors import InputError
from model.messages import Message

STDIN = "-"


@takes(model=ModelOptions, sampling=SamplingOptions, output=OutputOptions)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; `-` reads it from stdin.", show_default=False)
    ] = None,
    *,
    system: Annotated[
        str | None, typer.Option("-s", "--system", metavar="TEXT", help="System message.", show_default=False)
    ] = None,
    no_system: Annotated[bool, switch("--no-system", help="Without the checkpoint's default system message.")] = False,
    raw: Annotated[bool, switch("--raw", help="No chat template: continue the text (base models).")] = False,
    input_errors: Annotated[
        InputErrors, typer.Option("--input-errors", help="What to do with stdin that is not UTF-8.")
    ] = "strict",
    model: ModelOptions,
    sampling: SamplingOptions,
    no_stream: Annotated[
        bool, switch("--no-stream", panel=OUTPUT, help="Print the reply when it is complete.")
    ] = False,
    json_output: Annotated[bool, switch("--json", panel=OUTPUT, help="Print one JSON object.")] = False,
    jsonl: Annotated[bool, switch("--jsonl", panel=OUTPUT, help="Print a JSON line an event.")] = False,
    output: OutputOptions,
) -> None:
    """Answer one prompt: from the argument, from stdin, or from both (stdin goes behind the argument).

    dbrx generate -m demo "Why is the sky blue?"

    git diff | dbrx generate -m demo "Write a commit message for this diff."
    """
    if json_output and jsonl:
        raise InputError("--json and --jsonl exclude each other", "choose one")
    if raw and (system is not None or no_system):
        raise InputError("--raw has no system message", "leave out -s and --no-system")
    text = _prompt(prompt, input_errors, raw)
    report = Report(output)
    engine = open_engine(model, report)
    request = Request(
        text if raw else _conversation(text, system, no_system), sampling.over(engine.defaults), sampling.stop_strings
    )
    done = show(engine.stream(request), _renderer(model.model, json_output, jsonl, no_stream))
    report.detail(done.summary())
    if done.finish_reason == "interrupted":
        raise KeyboardInterrupt


def _prompt(prompt: str | None, errors: InputErrors, raw: bool) -> str:
    """Argument and stdin as one text, a blank line between them."""
    piped = read_piped(errors)
    if piped is not None and not raw:
        # The line's end that `echo` and editors add is no part of a message; of text to be continued it is.
        piped = piped.removesuffix("\n").removesuffix("\r")
    if prompt == STDIN:
        prompt = None
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


def _renderer(model: str, json_output: bool, jsonl: bool, no_stream: bool) -> Renderer:
    from dbrx_cli.render.jsonl import JsonLinesRenderer, JsonRenderer
    from dbrx_cli.render.plain import PlainRenderer

    if json_output:
        return JsonRenderer()
    return JsonLinesRenderer(model) if jsonl else PlainRenderer(stream=not no_stream)
