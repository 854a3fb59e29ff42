"""`dbrx generate`: one prompt and one reply, or a file of prompts."""

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from dbrx_cli.engine import Constraint, Done, Engine, Request, keeper
from dbrx_cli.engine.choose import open_engine
from dbrx_cli.engine.follower import needs_one_process
from dbrx_cli.extract import CodeOnly
from dbrx_cli.files import attached, read_file
from dbrx_cli.options import OUTPUT, EngineOptions, LogOptions, OutputOptions, SamplingOptions, switch, takes
from dbrx_cli.render import Renderer, show
from dbrx_cli.report import Report
from dbrx_cli.stdin import InputErrors, check_argument, decode, read_piped
from model.errors import DbrxError, InputError
from model.messages import Message

STDIN = "-"
BATCH, KEEPING = "Many prompts", "Keeping"
LARGEST_BATCH = 2**30  # bytes


@dataclass(frozen=True)
class PromptOptions:
    """What goes around the prompt."""

    file: Annotated[
        list[str] | None,
        typer.Option(
            "-f",
            "--file",
            metavar="PATH",
            help="Text file to put before the prompt (repeatable).",
            show_default=False,
        ),
    ] = None
    system: Annotated[
        str | None, typer.Option("-s", "--system", metavar="TEXT", help="System message.", show_default=False)
    ] = None
    no_system: Annotated[bool, switch("--no-system", help="Without the checkpoint's default system message.")] = False
    raw: Annotated[bool, switch("--raw", help="No chat template: continue the text (base models).")] = False
    input_errors: Annotated[
        InputErrors, typer.Option("--input-errors", help="What to do with stdin or files that are not UTF-8.")
    ] = "strict"

    def __post_init__(self) -> None:
        if self.raw and (self.system is not None or self.no_system):
            raise InputError("--raw has no system message", "leave out -s and --no-system")
        if self.system is not None and self.no_system:
            raise InputError("-s and --no-system exclude each other", "choose one")

    def read(self, argument: str | None) -> str:
        """Files, argument and stdin as one text, a blank line between them."""
        piped = read_piped(self.input_errors)
        if piped is not None and not self.raw:
            # The line's end that `echo` and editors add is no part of a message; of text to be continued it is.
            piped = piped.removesuffix("\n").removesuffix("\r")
        if argument == STDIN:
            argument = None
        parts = [attached(self.file, self.input_errors)] if self.file else []
        parts += [check_argument(argument, "the prompt")] if argument is not None else []
        parts += [piped] if piped is not None else []
        if not any(part.strip() for part in parts):
            raise InputError("there is no prompt", 'type one (dbrx generate "..."), or pipe one to stdin')
        return "\n\n".join(parts)

    def prompt(self, given: str | Sequence[Message]) -> str | Sequence[Message]:
        """A text, or messages, as a request takes it: text to continue, or a conversation with its system message."""
        if self.raw:
            if not isinstance(given, str):
                raise InputError("--raw continues a text and has no messages", "give `prompt`")
            return given
        turns = [Message("user", given)] if isinstance(given, str) else list(given)
        if turns[0].role != "system" and (self.system is not None or self.no_system):
            turns.insert(0, Message("system", check_argument(self.system or "", "--system")))
        return turns


@dataclass(frozen=True)
class FormOptions:
    """In which form the reply comes."""

    extract: Annotated[
        bool, switch("-x", "--extract", panel=OUTPUT, help="Print only the first fenced code block of the reply.")
    ] = False
    schema: Annotated[
        str | None,
        typer.Option(
            "--schema",
            metavar="FILE",
            help="The reply is JSON that fits this JSON Schema.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None
    grammar: Annotated[
        str | None,
        typer.Option(
            "--grammar",
            metavar="FILE",
            help="The reply fits this grammar, in Lark's form or GBNF.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None
    regex: Annotated[
        str | None,
        typer.Option(
            "--regex",
            metavar="EXPR",
            help="This regular expression matches the whole reply.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None
    no_stream: Annotated[bool, switch("--no-stream", panel=OUTPUT, help="Print the reply when it is complete.")] = False
    json_output: Annotated[bool, switch("--json", panel=OUTPUT, help="Print one JSON object.")] = False
    jsonl: Annotated[bool, switch("--jsonl", panel=OUTPUT, help="Print a JSON line an event.")] = False
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            metavar="K",
            min=0,
            max=20,
            help="In JSON: each token's logprob, and the K best.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.json_output and self.jsonl:
            raise InputError("--json and --jsonl exclude each other", "choose one")
        if len(chosen := self._forms) > 1:
            raise InputError(f"{chosen[0]} and {chosen[1]} exclude each other", "choose one")

    @property
    def _forms(self) -> list[str]:
        """Which flags say what the reply is to be."""
        forms = {"extract": self.extract or None, "schema": self.schema, "grammar": self.grammar, "regex": self.regex}
        return [f"--{name}" for name, value in forms.items() if value is not None]

    def constraint(self) -> Constraint | None:
        """What --schema, --grammar or --regex demands."""
        if self.schema is self.grammar is self.regex is None:
            return None
        from model.constrain import read_grammar, read_regex, read_schema

        if self.regex is not None:
            return Constraint(grammar=read_regex(check_argument(self.regex, "--regex"), "--regex"))
        if self.grammar is not None:
            return Constraint(grammar=read_grammar(decode(read_file(self.grammar), self.grammar), self.grammar))
        assert self.schema is not None
        return Constraint(read_schema(decode(read_file(self.schema), self.schema), self.schema))

    def renderer(self, model: str, *, raw: bool) -> Renderer:
        """raw: the text goes on from another one, and is not read as Markdown."""
        if self.json_output or self.jsonl:
            from dbrx_cli.render.jsonl import JsonLinesRenderer, JsonRenderer

            return JsonRenderer() if self.json_output else JsonLinesRenderer(model)
        if not (raw or self.no_stream or self._forms):
            from dbrx_cli.render.markdown import MarkdownRenderer, suits

            if suits(sys.stdout):
                return MarkdownRenderer()
        from dbrx_cli.render.plain import PlainRenderer

        return PlainRenderer(stream=not self.no_stream)


@dataclass(frozen=True)
class BatchOptions:
    """A file of prompts instead of one."""

    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="FILE",
            help="Answer each line of a file of JSON lines (`-`: stdin); answers are JSON lines.",
            rich_help_panel=BATCH,
            show_default=False,
        ),
    ] = None
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Where the answers go; what is in it already is not asked again.",
            rich_help_panel=BATCH,
            show_default=False,
        ),
    ] = None
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, max=256, help="Prompts at a time.", rich_help_panel=BATCH)
    ] = 8

    def __post_init__(self) -> None:
        if self.batch is None and self.output_file is not None:
            raise InputError("--output belongs to --batch", "use > FILE for one reply")


@dataclass(frozen=True)
class KeepOptions(LogOptions):
    """What outlives the process."""

    prompt_cache: Annotated[
        Path | None,
        typer.Option(
            "--prompt-cache",
            metavar="FILE",
            help="Keep the prompt's KV cache here: the next prompt that begins like it starts at once.",
            rich_help_panel=KEEPING,
            show_default=False,
        ),
    ] = None
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="FILE",
            help="Keep the reply here as it comes: after a crash the same command goes on with it.",
            rich_help_panel=KEEPING,
            show_default=False,
        ),
    ] = None


@takes(
    given=PromptOptions,
    model=EngineOptions,
    sampling=SamplingOptions,
    form=FormOptions,
    batch=BatchOptions,
    keep=KeepOptions,
    output=OutputOptions,
)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; `-` reads it from stdin.", show_default=False)
    ] = None,
    *,
    given: PromptOptions,
    model: EngineOptions,
    sampling: SamplingOptions,
    form: FormOptions,
    batch: BatchOptions,
    keep: KeepOptions,
    output: OutputOptions,
) -> None:
    """Answer one prompt: from the argument, from stdin, or from both (stdin goes behind the argument).

    dbrx generate -m demo "Why is the sky blue?"

    git diff | dbrx generate -m demo "Write a commit message for this diff."

    dbrx generate -m demo -f notes.txt "Summarize these notes."
    """
    report = Report(output)
    for flag, value in (("--batch", batch.batch), ("--prompt-cache", keep.prompt_cache), ("--resume", keep.resume)):
        if value is not None:
            needs_one_process(flag)
    if batch.batch is not None:
        _refuse_with_batch(prompt, given, form, keep)
        _answer_batch(given, model, sampling, form, batch, report)
        return
    if form.logprobs is not None and not (form.json_output or form.jsonl):
        raise InputError("--logprobs needs --json or --jsonl", "add one of them")
    text = given.read(prompt)
    constraint = form.constraint()
    stop = sampling.stop_strings
    for path in (keep.prompt_cache, keep.resume):
        if path is not None and model.url is None:
            from dbrx_cli.engine.saved import refuse_foreign

            refuse_foreign(path)  # before the model is loaded
    engine = open_engine(model, report)
    request = Request(
        given.prompt(text),
        sampling.over(engine.defaults),
        stop,
        constraint=constraint,
        logprobs=form.logprobs,
        resume=keep.resume,
    )
    if keep.prompt_cache is not None:
        keeper(engine).load_cache(keep.prompt_cache)
    done, fault = _show(engine, request, form, report)
    if keep.prompt_cache is not None:
        keeper(engine).save_cache(keep.prompt_cache)
    report.detail(done.summary())
    if not keep.no_log:
        _log(sampling, request, done, report)
    if fault:
        raise fault
    if done.finish_reason == "interrupted":
        raise KeyboardInterrupt


def _show(engine: Engine, request: Request, form: FormOptions, report: Report) -> tuple[Done, DbrxError | None]:
    """Show the reply; the record of all of it, whatever part was shown, and what was missing in it."""
    renderer = form.renderer(engine.name, raw=isinstance(request.prompt, str))
    with report.status("reading the prompt") as status:
        stream = engine.stream(replace(request, on_read=status.read))
        if not form.extract:
            done = show(stream, renderer, status)
            _tell_if_empty("the reply", done, report)
            return done, done.error
        code = CodeOnly()
        try:
            done = show(code.of(stream), renderer, status)
        except DbrxError as fault:
            if code.reply is None:
                raise
            return code.reply, code.reply.error or fault
    _tell_if_empty("the code block", done, report)
    return code.reply or done, done.error


def _tell_if_empty(what: str, done: Done, report: Report) -> None:
    """Nothing on stdout looks like a fault of the program, or of the pipe."""
    why = {"stop": "the model ended it", "length": "--max-tokens ended it", "stop_string": "a stop string ended it"}
    if not done.text.strip() and done.error is None and done.finish_reason in why:
        report.notice(f"{what} is empty: {why[done.finish_reason]} before any text")


def _log(sampling: SamplingOptions, request: Request, done: Done, report: Report) -> None:
    from dbrx_cli.store import log_generate

    settings = {name: value for name, value in vars(sampling).items() if value is not None}
    log_generate(done.model, done.revision, settings, request.prompt, done, report.notice)


def _refuse_with_batch(prompt: str | None, given: PromptOptions, form: FormOptions, keep: KeepOptions) -> None:
    for found, flag in (
        (prompt is not None, "a prompt"),
        (given.file, "--file"),
        (form.extract, "--extract"),
        (form.json_output, "--json"),
        (form.jsonl, "--jsonl"),
        (form.no_stream, "--no-stream"),
        (keep.prompt_cache, "--prompt-cache"),
        (keep.resume, "--resume"),
    ):
        if found:
            raise InputError(f"--batch and {flag} exclude each other", "its answers are JSON lines, a line a prompt")


def _answer_batch(
    given: PromptOptions,
    model: EngineOptions,
    sampling: SamplingOptions,
    form: FormOptions,
    batch: BatchOptions,
    report: Report,
) -> None:
    from dbrx_cli.answers import AnswerFile, StandardOutput, key
    from dbrx_cli.batch import Prompt, read_jobs, run, stream_jobs

    assert batch.batch is not None
    name = "stdin" if batch.batch == STDIN else batch.batch
    if batch.batch == STDIN and batch.output_file is None:
        parts = stream_jobs(sys.stdin.buffer, name, given.input_errors)
        first = next(parts)  # before a model is loaded
    else:  # all of them, to find those that have an answer
        data = sys.stdin.buffer.read(LARGEST_BATCH + 1) if batch.batch == STDIN else read_file(name, LARGEST_BATCH)
        if len(data) > LARGEST_BATCH:
            raise InputError(f"{name} has more than {LARGEST_BATCH // 2**20} MiB", "give a part of it")
        parts, first = iter(()), read_jobs(data, name, given.input_errors)
    constraint, stop = form.constraint(), sampling.stop_strings
    # A server says which model it has; one here is not loaded before it is known that something is to be asked.
    engine = open_engine(model, report) if model.url is not None else None
    with report.status(f"starting {model.model}"):
        flags = _asked(given, model, sampling, form, constraint, report)
    wanted = {key(job.id, job.index): job.wanted(flags) for job in first}
    name = engine.name if engine else model.model
    answers = AnswerFile(batch.output_file, wanted, name) if batch.output_file else StandardOutput()
    with closing(answers):
        if len(answers.answered) == len(first):
            report.notice(f"all {len(first)} prompts were answered before")
            return
        engine = engine or open_engine(model, report)
        params = sampling.over(engine.defaults)

        def ask(prompt: Prompt) -> Request:
            return Request(given.prompt(prompt), params, stop, constraint=constraint, logprobs=form.logprobs)

        run(engine, chain([first], parts), ask, flags, answers, batch.batch_size, report)


def _asked(
    given: PromptOptions,
    model: EngineOptions,
    sampling: SamplingOptions,
    form: FormOptions,
    constraint: Constraint | None,
    report: Report,
) -> dict[str, Any]:
    """What decides about the answers of all lines: names, as a fault tells them, and values or their digests.

    Flags count as they were given, so that it is known before a model is loaded.
    """
    from dbrx_cli.batch import digest

    asked: dict[str, Any] = {f"--{name.replace('_', '-')}": value for name, value in vars(sampling).items()}
    asked |= {
        "--lookup": None,  # the text is the same with and without
        "--stop": digest(sampling.stop) if sampling.stop else None,
        "--system": digest(given.system) if given.system is not None else None,
        "--no-system": given.no_system,
        "--raw": given.raw,
        "--schema": digest(constraint.json_schema) if constraint and constraint.json_schema is not None else None,
        "--grammar": digest(constraint.grammar) if constraint and constraint.grammar is not None else None,
        "--logprobs": form.logprobs,
        "--context": model.context,
        "--url": True if model.url is not None else None,  # where it stands may change
    }
    if model.url is None:
        from dbrx_cli.engine.fingerprint import of_files
        from dbrx_cli.engine.load import find_model

        adapter = Path(model.adapter) if model.adapter is not None else None
        asked |= {
            "--dtype": model.dtype,
            "--quantize": model.quantize,
            "--revision": model.revision,
            "--adapter": of_files(adapter) if adapter is not None and os.path.exists(adapter) else None,
            "version of the model's files": of_files(find_model(model, report)),
        }
    return asked
