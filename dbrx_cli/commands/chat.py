"""`dbrx chat`: a conversation in the terminal, or a script of turns from a pipe."""

import os
import shlex
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated

import typer

from dbrx_cli.complete import session_names
from dbrx_cli.engine.choose import open_engine
from dbrx_cli.options import (
    DEFAULT_MODEL,
    DEMOS,
    OUTPUT,
    EngineOptions,
    LogOptions,
    OutputOptions,
    SamplingOptions,
    switch,
    takes,
)
from dbrx_cli.stdin import check_argument
from model.errors import InputError

if TYPE_CHECKING:
    from dbrx_cli.store import Recorder, Session

SESSION = "Session"


@takes(model=EngineOptions, sampling=SamplingOptions, output=OutputOptions, keep=LogOptions)
def chat(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILES", help="Text files to put before the first message.", show_default=False),
    ] = None,
    *,
    system: Annotated[
        str | None, typer.Option("-s", "--system", metavar="TEXT", help="System message.", show_default=False)
    ] = None,
    go_on: Annotated[bool, switch("-c", "--continue", panel=SESSION, help="Take up the last session.")] = False,
    session: Annotated[
        str | None,
        typer.Option(
            "--session",
            rich_help_panel=SESSION,
            metavar="NAME",
            help="Take up a session by name or number, or begin one of that name.",
            show_default=False,
            autocompletion=session_names,
        ),
    ] = None,
    model: EngineOptions,
    sampling: SamplingOptions,
    no_markdown: Annotated[
        bool, switch("--no-markdown", panel=OUTPUT, help="Show replies as they are, on a terminal too.")
    ] = False,
    output: OutputOptions,
    keep: LogOptions,
) -> None:
    """Talk with the model. Enter sends, Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands.

    dbrx chat -m demo

    dbrx chat -m demo notes.txt

    dbrx chat -m demo < script.txt
    """
    from dbrx_cli.conversation import Conversation
    from dbrx_cli.repl.conversation_commands import put
    from dbrx_cli.repl.loop import Repl
    from dbrx_cli.repl.notices import ChatReport
    from dbrx_cli.repl.phrases import quote
    from dbrx_cli.repl.session_commands import take_up
    from dbrx_cli.repl.signals import Signals
    from dbrx_cli.repl.typeahead import Typeahead
    from dbrx_cli.store import Recorder

    texts = {name: _attached(name) for name in files or ()}
    if go_on and session is not None:
        raise InputError("--continue and --session exclude each other", "choose one")
    conversation = Conversation(None if system is None else check_argument(system, "--system"))
    stop = sampling.stop_strings
    report = ChatReport(output)
    settings = {name: value for name, value in vars(sampling).items() if value is not None}
    recorder = Recorder("chat", model.model, model.revision, settings, report.notice, enabled=not keep.no_log)
    found = _session(recorder, go_on, session)
    # From here on, so that nothing is lost of what is typed or pasted while the model is loaded.
    with Signals() as signals, Typeahead() as typed:
        with signals.heard():
            engine = open_engine(model, report)
        recorder.model = engine.name
        params = sampling.over(engine.defaults)
        repl = Repl(
            engine,
            conversation,
            params,
            stop,
            report,
            recorder,
            signals,
            typed,
            name=engine.name,
            asked=model.model,
            again=_again(model),
            markdown=not no_markdown,
        )
        repl.welcome()
        if found:
            with signals.heard():
                take_up(repl, found)
            if system is not None:
                repl.conversation = Conversation(conversation.system, found.turns)
        elif session is not None:
            repl.name_session(session)
            near = get_close_matches(session, recorder.store().names(), 1) if recorder.enabled else []
            report.notice(f"a new session, {quote(session)}{f'; there is also {quote(near[0])}' if near else ''}")
        for name, text in texts.items():
            put(repl, name, text)
        repl.run()


def _attached(name: str) -> str:
    from dbrx_cli.repl.conversation_commands import attach

    try:
        return attach(name)
    except InputError as fault:
        if name in DEMOS or (name.count("/") == 1 and not os.path.exists(name)):
            raise InputError(f"{name!r} is no text file", f"a model is named by -m: dbrx chat -m {name}") from None
        raise fault


def _again(model: EngineOptions) -> str:
    """The command that talks with the same model."""
    where = {"--url": model.url, "-m": model.model if model.model != DEFAULT_MODEL else None}
    return shlex.join(["dbrx", "chat", *(word for flag, value in where.items() if value for word in (flag, value))])


def _session(recorder: "Recorder", latest: bool, name: str | None) -> "Session | None":
    """The session to take up: looked for before the model is loaded, which may take minutes."""
    if latest:
        found = recorder.store().latest()
        if found is None:
            raise InputError("there is no session to take up", "leave out --continue")
        return found
    if name is not None and (name.isdigit() or name in recorder.store().names()):
        return recorder.store().find(name)
    return None
