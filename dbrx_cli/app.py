"""The command `dbrx`: its commands, and how faults reach the user."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import Annotated

import typer
from typer.exceptions import TyperException

from . import __version__, check_model_package

check_model_package()  # before anything imports `model`

from .commands import chat, download, generate  # noqa: E402

DEBUG = "DBRX_DEBUG"
READER_GONE = 141  # 128 + SIGPIPE, as of a program that the signal ended

app = typer.Typer(
    name="dbrx",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("download")(download.download)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dbrx {__version__}")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and leave.", metavar=""
        ),
    ] = False,
) -> None:
    """Chat with DBRX, Databricks' open mixture-of-experts language model.

    Try it at once with a small demo model: dbrx chat -m demo
    """


def main() -> None:
    """Run the command line and leave with the exit code of the contract (docs/cli.md)."""
    stdout = sys.stdout
    code = _run()
    if sys.stdout is not stdout:  # typer put a quiet wrapper around it: the reader of the pipe is gone
        code = READER_GONE
    try:
        stdout.flush()
    except BrokenPipeError:
        code = READER_GONE
    if code == READER_GONE:
        # The interpreter flushes once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    sys.exit(code)


def _run() -> int:
    from model.errors import DbrxError

    try:
        return int(app(prog_name="dbrx", standalone_mode=False) or 0)
    except SystemExit as error:  # typer leaves so when a pipe breaks
        return error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except DbrxError as error:
        return _fault(error.one_line, error.exit_code)
    except TyperException as error:
        return _fault(f"{error.format_message().rstrip('.')}; see --help", error.exit_code)
    except MemoryError:
        return _fault("out of memory; close other programs, or choose a smaller --dtype or --context", 5)
    except Exception as error:
        name = type(error).__name__
        return _fault(f"internal error: {name}: {error}; set {DEBUG}=1 to see where, and please report it", 1)


def _fault(line: str, code: int) -> int:
    if os.environ.get(DEBUG) == "1":
        traceback.print_exc()
    with contextlib.suppress(OSError):
        print(f"dbrx: {line}", file=sys.stderr)
    return code
