"""Commands that take the conversation somewhere: the clipboard, a session, a file."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_cli.conversation import Conversation
from dbrx_cli.private import refuse_present, write_private
from dbrx_cli.repl.phrases import count, quote, unquoted
from dbrx_cli.session_cache import take_cache
from model.errors import InputError

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl
    from dbrx_cli.store import Session

LISTED = 20


def copy(repl: Repl, argument: str) -> None:
    from dbrx_cli.repl.clipboard import copy_text

    reply = next((turn.content for turn in reversed(repl.conversation.turns) if turn.role == "assistant"), None)
    if reply is None:
        raise InputError("there is no reply yet")
    if argument not in ("", "code"):
        raise InputError("/copy copies the reply, /copy code its last block of code")
    text = _last_code(reply) if argument else reply
    repl.report.notice(copy_text(text, terminal=repl.interactive))


def save(repl: Repl, argument: str) -> None:
    if not repl.conversation.turns:
        raise InputError("there is nothing to save yet")
    if not repl.recorder.enabled:
        raise InputError("sessions are switched off", "/export FILE writes the conversation to a file")
    repl.save()
    name = unquoted(argument)
    if argument and repl.recorder.id is not None:
        was = repl.recorder.store().find(repl.recorder.id).name
        repl.name_session(name)
        if was is not None and was != name:
            repl.report.notice(f"{quote(was)} is now called {quote(name)}")
            return
    called = f" as {quote(name)}" if name else ""
    repl.report.notice(f"session {repl.recorder.id} is saved{called}; every turn is saved as it comes")


def load(repl: Repl, argument: str) -> None:
    if not argument:
        raise InputError("/load needs the name or number of a session", "/sessions lists them")
    try:
        session = repl.recorder.store().find(unquoted(argument))
    except InputError as fault:
        near = fault.hint if "did you mean" in (fault.hint or "") else "/sessions lists them"
        raise InputError(fault.message, near) from None
    take_up(repl, session)


def take_up(repl: Repl, session: Session) -> None:
    """Go on in a session that was saved."""
    repl.branches = repl.recorder.resume(session)
    take_cache(repl.engine, session.id, repl.report)
    repl.session_name = None
    repl.branch = next(n for n in range(1, len(repl.branches) + 2) if n not in repl.branches)
    repl.conversation = Conversation(session.system, session.turns)
    repl.ended = bool(session.timings) and (session.timings[-1] or {}).get("finish_reason") == "stop"
    repl.used = repl.engine.count(repl.conversation.messages) if session.turns else 0
    name = session.name or str(session.id)
    reads = repl.reading(repl.conversation, "; the next message reads {}", "more token") if session.turns else ""
    repl.report.notice(f"session {name}, {count(len(session.turns), 'message')}{reads}")
    if session.model not in (repl.name, repl.asked):
        repl.report.notice(f"it was held with {session.model}, and goes on with {repl.name}")
    repl.show_again(session.turns[-2:])


def sessions(repl: Repl, argument: str) -> None:
    entries = repl.recorder.store().list("chat", LISTED)
    if not entries:
        repl.report.line("there are no sessions yet")
    for entry in entries:
        mark = "*" if entry.id == repl.recorder.id else " "
        name = f"{entry.name}: " if entry.name else ""
        when = f"{datetime.fromisoformat(entry.updated).astimezone():%Y-%m-%d %H:%M}"
        start = f"{mark}{entry.id:>4}  {when}  "
        repl.report.line(start + quote(name + entry.title, repl.columns - len(start) - 1)[1:-1])


def export(repl: Repl, argument: str) -> None:
    from dbrx_cli.store import export_json, export_markdown

    writers = {".md": export_markdown, ".json": export_json}
    name = unquoted(argument.removeprefix("!").strip())
    path = Path(os.path.expanduser(name))
    write = writers.get(path.suffix.lower())
    if write is None:
        raise InputError("/export needs the name of a file that ends with .md or .json", "type /export FILE")
    if not repl.conversation.turns:
        raise InputError("there is nothing to export yet")
    over = argument.startswith("!")
    if not over:
        refuse_present(path, f"to write over it: /export !{name}")
    write_private(path, write(_session(repl)), over=over)
    repl.report.notice(f"{count(len(repl.conversation.turns), 'message')} written to {path}")


def _session(repl: Repl) -> Session:
    """The session as it was saved; without a store, what is known of it."""
    from dbrx_cli.store import Session

    if repl.recorder.id is not None:
        return repl.recorder.store().find(repl.recorder.id)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    turns = repl.conversation.turns
    system = repl.conversation.system
    return Session(0, "Conversation", "chat", repl.name, None, {}, system, turns, [None] * len(turns), now, now)


def _last_code(reply: str) -> str:
    from dbrx_cli.render.blocks import parser

    blocks = [token.content for token in parser().parse(reply) if token.type == "fence"]
    if not blocks:
        raise InputError("the reply has no block of code", "/copy copies all of it")
    return blocks[-1]
