"""The command `dbrx`: its commands, and how faults reach the user."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
import traceback
from functools import partialmethod
from inspect import getdoc
from typing import Annotated, Any

import typer
from typer._completion_shared import _completion_scripts
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from . import __version__, check_model_package, early

check_model_package()  # before anything imports `model`

from .commands import (  # noqa: E402
    bench,
    chat,
    config,
    convert,
    doctor,
    download,
    export,
    generate,
    models,
    plan,
    quantize,
    serve,
    sessions,
    tokenize,
    trace,
)
from .cores import drop_wrong, settle_pages  # noqa: E402
from .engine.follower import follow, is_follower, leave, needs_one_process  # noqa: E402
from .options import OutputOptions, leave_out_colour, switch  # noqa: E402
from .output import say, tell, tell_lines  # noqa: E402
from .precedence import with_origin  # noqa: E402
from .report import DEBUG, Report, settle_libraries  # noqa: E402

NARROW = 60  # columns
FORMS = {"quantize": "--to", "convert": "--to", "export": "--type"}  # what takes q8_0 or int4, in others --quantize
READER_GONE = 141  # 128 + SIGPIPE, as of a program that the signal ended

REWORDED = (
    ("Input should be a valid integer, .*", "it must be a whole number"),
    ("Input should be a valid number, .*", "it must be a number"),
    ("Value error, ('.*' is not one of)", r"\1"),
)

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="dbrx",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("download")(download.download)
app.command("convert")(convert.convert)
app.command("bench")(bench.bench)
app.command("quantize")(quantize.quantize)
app.command("export")(export.export)
app.command("trace")(trace.trace)
app.command("plan")(plan.plan)
app.command("tokenize")(tokenize.tokenize)
app.command("doctor")(doctor.doctor)
app.add_typer(models.app, name="models")
app.add_typer(sessions.app, name="sessions")
app.add_typer(config.app, name="config")


def _without_types(command: type[Any]) -> None:
    """In help, a flag without a value has no `<bool>` behind it: not those that the library adds, either."""
    inherited = command.get_params

    def get_params(self: Any, context: typer.Context) -> list[Any]:
        found: list[Any] = inherited(self, context)
        for parameter in found:
            if getattr(parameter, "is_bool_flag", False) or "help" in parameter.name:
                parameter.metavar = ""
        return found

    command.get_params = get_params


PANELS = {
    "Talk": ("chat", "generate", "serve"),
    "Models": ("download", "models", "plan", "convert", "export", "quantize", "bench"),
    "Look inside": ("trace", "tokenize", "doctor"),
    "Your own": ("sessions", "config"),
}
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
for kind in (TyperCommand, TyperGroup):
    _without_types(kind)
for command in app.registered_commands:
    command.rich_help_panel = PANEL_OF.get(command.name or "")
    # In the list of commands, the first sentence is enough.
    command.short_help = (getdoc(command.callback) or "").split("\n\n")[0].split(". ")[0].rstrip(".") + "."
for group in app.registered_groups:
    group.rich_help_panel = PANEL_OF.get(group.name or "")
    group.short_help = group.typer_instance.info.help if group.typer_instance else None


# zsh reads the file of a completion at the first Tab, and expects it to complete then, not only to say how.
_completion_scripts["zsh"] += '[[ $zsh_eval_context[-1] == loadautofunc ]] && %(complete_func)s "$@"\n'


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"dbrx {__version__}")
        raise typer.Exit()


@app.callback()
def common(
    context: typer.Context,
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and leave.", metavar=""
        ),
    ] = False,
    no_color: Annotated[bool, switch("--no-color", callback=leave_out_colour, help="No colours (NO_COLOR=1).")] = False,
) -> None:
    """Chat with DBRX, Databricks' open mixture-of-experts language model.

    Try it at once with a small demo model:

    dbrx chat -m demo

    git diff | dbrx generate -m demo "Write a commit message for this diff."
    """
    if context.invoked_subcommand not in PANELS["Talk"]:  # no other command has work for the other ranks
        needs_one_process(f"dbrx {context.invoked_subcommand}")


def main() -> None:
    """Run the command line and leave with the exit code of the contract (docs/cli.md)."""
    early.end_quietly()
    stdout = sys.stdout
    try:
        code = _run()
    except KeyboardInterrupt:  # as the last line of it was done
        code = early.INTERRUPTED
        early.end_quietly()
    if sys.stdout is not stdout:  # typer put a quiet wrapper around it: the reader of the pipe is gone
        code = READER_GONE
    try:
        stdout.flush()
    except BrokenPipeError:
        code = READER_GONE
    if code == READER_GONE:
        # The interpreter flushes once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    leave(code)


def _run() -> int:
    from model.errors import DbrxError

    settle_pages()
    settle_libraries()
    report = Report(OutputOptions(quiet=bool({"-q", "--quiet"} & set(sys.argv))))
    # Which hears warnings until a command has one of its own.
    for sentence in drop_wrong():
        report.notice(sentence)
    try:
        early.interrupt()
        if is_follower():
            follow()
            return 0
        _fit_help()
        return int(app(prog_name="dbrx", standalone_mode=False) or 0)
    except SystemExit as error:  # typer and rich leave so when a pipe breaks
        if isinstance(error.__context__, BrokenPipeError):
            return READER_GONE
        return error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        return early.INTERRUPTED
    except DbrxError as error:
        return _fault(error.one_line, error.exit_code)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        message = error.format_message().rstrip(".")
        if not message:  # no command was typed, and the help was shown
            return error.exit_code
        return _fault(_advised(with_origin(context, _reworded(message)), context), error.exit_code)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        from .engine.memory import lacks_memory
        from .private import FULL

        if isinstance(error, OSError) and error.filename is not None:
            return _fault(f"{os.fsdecode(error.filename)}: {error.strerror}", 5 if error.errno in FULL else 2)
        if lacks_memory(error):
            return _fault("out of memory; close other programs, or choose a smaller --dtype or --context", 5)
        name = type(error).__name__
        return _fault(f"internal error: {name}: {error}; set {DEBUG}=1 to see where, and please report it", 1)
    finally:
        early.end_quietly()


def _fit_help() -> None:
    """On a narrow or dumb terminal, help without frames, which would cut off the names of flags."""
    columns = shutil.get_terminal_size().columns
    plain = columns < NARROW or os.environ.get("TERM") == "dumb"
    app.rich_markup_mode = None if plain else "rich"
    CONTEXT["terminal_width"] = columns if plain else None
    if columns < NARROW:
        formatter: Any = typer.Context.formatter_class
        formatter.write_dl = partialmethod(formatter.write_dl, col_max=columns // 4)  # long flags get their own line


def _reworded(message: str) -> str:
    """What the library that parses says, in one line of this program's words."""
    if message.startswith("Missing option"):
        missing, _, choices = message.partition("Choose from:")
        message = missing.rstrip(". ") + (f" ({', '.join(choices.replace(',', ' ').split())})" if choices else "")
    for pattern, ours in REWORDED:
        message = re.sub(pattern, ours, message)
    return message


def _advised(message: str, context: typer.Context | None) -> str:
    """The message of a fault in what was typed, with what to type."""
    words = sys.argv[1:]
    if context is not None and context.parent is None and words and message.startswith("No such"):
        if words[0] in ("help", "version"):
            return f"{message}; type dbrx --{words[0]}"
        if words[0] in ("-m", "--model"):
            return f"{words[0]} stands behind a command; type dbrx chat {shlex.join(words)}"
        if " " in words[0]:
            return f"{message}; to ask the model: dbrx generate {shlex.join(words)}"
    if context is not None and message.startswith("No such option: "):
        typed, mine = message.split()[3], FORMS.get(str(context.info_name), "--quantize")
        if typed in (*FORMS.values(), "--quantize") and any(
            mine in parameter.opts for parameter in context.command.params
        ):
            return f"No such option: {typed}; {context.command_path} calls it {mine}"
    return f"{message}; see {context.command_path if context else 'dbrx'} --help"


def _fault(line: str, code: int) -> int:
    if os.environ.get(DEBUG) == "1":
        tell_lines(traceback.format_exc())
    with contextlib.suppress(OSError):
        tell(f"dbrx: {line}")
    return code
