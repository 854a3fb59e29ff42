"""`dbrx trace`: which experts each token of a prompt chose."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbrx_cli.engine.choose import load_engine
from dbrx_cli.options import ModelOptions, OutputOptions, switch, takes
from dbrx_cli.output import say_json
from dbrx_cli.private import refuse_present, write_private
from dbrx_cli.report import Report
from dbrx_cli.stdin import InputErrors, check_argument, read_piped
from model.errors import ContextError, InputError
from model.messages import Message

if TYPE_CHECKING:
    from dbrx_cli.engine.local import LocalEngine
    from model.tokenizer import Tokenizer
    from model.trace import Trace

STDIN = "-"


@takes(model=ModelOptions, output=OutputOptions)
def trace(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; without it, or as `-`, stdin.", show_default=False)
    ] = None,
    *,
    system: Annotated[
        str | None, typer.Option("-s", "--system", metavar="TEXT", help="System message.", show_default=False)
    ] = None,
    raw: Annotated[bool, switch("--raw", help="No chat template: only the tokens of the text.")] = False,
    new_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", min=0, help="Trace a greedy reply of so many tokens, too.")
    ] = 0,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page to explore.", show_default=False)
    ] = None,
    json_output: Annotated[bool, switch("--json", help="Print one JSON object.")] = False,
    input_errors: Annotated[
        InputErrors, typer.Option("--input-errors", help="What to do with stdin that is not UTF-8.")
    ] = "strict",
    model: ModelOptions,
    output: OutputOptions,
) -> None:
    """Show which experts the tokens of a prompt choose in each layer: a heat map, how even, what a cache would save.

    dbrx trace -m demo-moe "The capital of France is Paris."

    dbrx trace -m ./checkpoint --raw --html routing.html < essay.txt
    """
    if raw and system is not None:
        raise InputError("--raw has no system message", "leave out -s")
    if html is not None:
        refuse_present(html)
    text = _prompt(prompt, input_errors)
    report = Report(output)
    engine = load_engine(model, report)
    from dbrx_cli.engine.damage import damage_named
    from dbrx_cli.engine.use import add_use
    from model.trace import counts, record

    ids = _encode(engine.tokenizer, text if raw else _messages(text, system))
    if len(ids) + new_tokens > engine.context:
        raise ContextError(
            f"the prompt has {len(ids)} tokens, the reply up to {new_tokens}, and the context is {engine.context}",
            "shorten the prompt, or lower -n",
        )
    with damage_named(engine.source):
        reply = _reply(engine, ids, new_tokens) if new_tokens else []
        recorded = record(engine.network, [*ids, *reply])
    if engine.source is not None:
        add_use(engine.source, counts(recorded).tolist())
    _show(recorded, engine.tokenizer, len(ids), model, report, html, json_output)


def _show(
    recorded: "Trace",
    tokenizer: "Tokenizer",
    prompt_tokens: int,
    model: ModelOptions,
    report: Report,
    html: Path | None,
    json_output: bool,
) -> None:
    from dbrx_cli.render import routing

    values: dict[str, Any] = {}
    if html or json_output:
        tokens = describe(tokenizer, recorded.ids, prompt_tokens)
        values = routing.to_dict(recorded, tokens, model.model, model.revision)
    if html:
        write_private(html, routing.html_page(values), over=False, hint="choose another file for --html")
        report.notice(f"wrote {html}")
    if (html or json_output) and (word := routing.plain_word(recorded)):
        report.notice(word)
    if json_output:
        say_json(values)
    elif not html:
        from dbrx_cli.render.console import PlainConsole

        console = PlainConsole()
        console.print(routing.title(recorded, model.model, prompt_tokens), style="bold", soft_wrap=True)
        console.print(routing.heat_map(recorded))
        console.print(routing.figures(recorded))


def describe(tokenizer: "Tokenizer", ids: tuple[int, ...], prompt_tokens: int) -> list[dict[str, Any]]:
    """Each token as the JSON has it."""
    from dbrx_cli.render.routing import token_texts

    special = set(tokenizer.special_tokens.values())
    texts = token_texts([tokenizer.decode_bytes(i) for i in ids])
    return [
        {"id": i, "text": text, "special": i in special, "part": "prompt" if at < prompt_tokens else "reply"}
        for at, (i, text) in enumerate(zip(ids, texts, strict=True))
    ]


def _prompt(prompt: str | None, errors: InputErrors) -> str:
    """The argument, or stdin without the line's end that `echo` adds."""
    if prompt is not None and prompt != STDIN:
        text = check_argument(prompt, "the prompt")
    else:
        text = (read_piped(errors) or "").removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise InputError("there is no prompt", 'type one (dbrx trace "..."), or pipe one to stdin')
    return text


def _messages(text: str, system: str | None) -> list[Message]:
    first = [] if system is None else [Message("system", check_argument(system, "--system"))]
    return [*first, Message("user", text)]


def _encode(tokenizer: "Tokenizer", prompt: str | list[Message]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.encode_segments(tokenizer.chat_template.segments(prompt))


def _reply(engine: "LocalEngine", ids: list[int], new_tokens: int) -> list[int]:
    """The likeliest reply; what the engine's options say of sampling would only blur the picture."""
    import torch

    prompt = torch.tensor([ids], device=engine.network.device)
    ends = list(engine.tokenizer.eos_token_ids)
    whole = engine.network.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends)
    return [int(i) for i in whole[0, len(ids) :]]
