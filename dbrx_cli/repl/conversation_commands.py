"""Commands that change the conversation."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from dbrx_cli.conversation import Conversation
from dbrx_cli.engine import Request
from dbrx_cli.files import attached
from dbrx_cli.repl.branches import answer_as_branch
from dbrx_cli.repl.phrases import count, quote, quote_message, unquoted
from model.errors import ContextError, InputError
from model.messages import Message

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl

SHOWN = 40  # characters of a path; of a longer one, the file's own name
ROOM = 8  # /read leaves this part of the context, one in so many, for a question and its reply


def regenerate(repl: Repl, argument: str) -> None:
    asked = repl.conversation.before(_last_question(repl) + 1)
    question = quote_message(asked.turns[-1].content, 30)
    repl.report.notice(f"another reply to {question}{repl.reading(asked, '; reads {}')}")
    request = Request(asked.fit(repl.engine).messages, repl.params, repl.stop)
    if request == repl.answered and (repl.params.greedy or repl.params.seed is not None):
        why = "the temperature is 0" if repl.params.greedy else f"the seed is {repl.params.seed}"
        repl.report.notice(f"{why}, so the reply will be the same; /set changes that")
    repl.answer(asked)


def go_on(repl: Repl, argument: str) -> None:
    if not repl.conversation.turns or repl.conversation.turns[-1].role != "assistant":
        raise InputError("there is no reply to go on with")
    if repl.ended:
        raise InputError("the model ended its reply, and adds nothing", "ask for more, or /regen for another one")
    repl.report.notice(f"going on{repl.reading(repl.conversation, '; reads {}')}")
    repl.answer(repl.conversation, go_on=True)


def edit(repl: Repl, argument: str) -> None:
    from dbrx_cli.repl.editor import edit_text

    if not repl.interactive:
        raise InputError("/edit needs a terminal", "write the message again in its place")
    question = _question(repl, argument)
    old = repl.conversation.turns[question].content
    with repl.signals.waiting(), repl.typed.left_to_program(), repl.signals.heard():
        new = edit_text(old).strip("\n")
    if not new.strip() or new == old.strip("\n"):
        repl.report.notice("the message stays as it was")
        return
    repl.reader.remember(new)
    asked = repl.conversation.before(question).ask(new)
    repl.report.line(f">>> {new}")
    if reads := repl.reading(asked, "reads {}"):
        repl.report.notice(reads)
    answer_as_branch(repl, asked)


def undo(repl: Repl, argument: str) -> None:
    if repl.files:
        name, _ = repl.files.popitem()
        repl.report.notice(f"took back {quote(name)}, which waited for your next message")
        return
    question = _last_question(repl)
    text = repl.conversation.turns[question].content
    repl.change(repl.conversation.before(question))
    repl.report.notice(
        f"took back {quote_message(text, 40)} and the reply; {count(len(repl.conversation.turns), 'message')} left"
    )


def clear(repl: Repl, argument: str) -> None:
    repl.recorder.renew()
    repl.session_name = None
    repl.files.clear()
    repl.branches, repl.branch = {}, 1
    repl.change(Conversation(repl.conversation.system))
    repl.report.notice("new conversation")


def system(repl: Repl, argument: str) -> None:
    if argument == "default":
        changed = replace(repl.conversation, system=None)
    elif argument:
        changed = replace(repl.conversation, system=argument)
    else:
        text = repl.conversation.system
        repl.report.line("(the checkpoint's default)" if text is None else text or "(none)")
        return
    again = repl.reading(changed, "; the next message will read {}") if changed.turns else ""
    repl.change(changed)
    repl.report.notice(f"system message set{again}")


def read(repl: Repl, argument: str) -> None:
    if argument == "-":
        repl.report.notice(f"dropped {count(len(repl.files), 'file')}")
        repl.files.clear()
        return
    if not argument:
        _list_files(repl)
        return
    name = argument if os.path.exists(os.path.expanduser(argument)) else unquoted(argument)
    put(repl, name, attach(os.path.expanduser(name)))


def attach(path: str) -> str:
    """A text file as a message has it before its own text."""
    return attached([path]) + "\n\n"


def put(repl: Repl, name: str, text: str) -> None:
    """Have a file wait for the next message; `ContextError` if it leaves no room for a question."""
    files = repl.files | {name: text}
    shown = quote(name if len(name) <= SHOWN else os.path.basename(name), SHOWN)
    asked = repl.conversation.ask("".join(files.values()))
    context = repl.engine.context
    try:
        needed = repl.engine.count(asked.fit(repl.engine).messages)
    except ContextError:
        needed = context
    if needed > context - context // ROOM:
        tokens = repl.engine.count(asked.turns[-1:])
        raise ContextError(
            f"{shown} leaves no room for a question: the message would have {tokens} tokens, and the "
            f"context is {context}",
            "give a part of it, or start with a larger --context",
        )
    reads = repl.reading(asked, ": reads {}")
    repl.files = files
    repl.report.notice(f"{shown} goes before your next message{reads}")


def _list_files(repl: Repl) -> None:
    if not repl.files:
        raise InputError("no file waits for your next message", "type /read FILE")
    for name, text in repl.files.items():
        tokens = repl.engine.count([Message("user", text)])
        repl.tell(f"{quote(name)} waits for your next message: {count(tokens, 'token')}")
    repl.tell("/read - drops what waits, /undo the last one")


def _question(repl: Repl, number: str) -> int:
    """The place of the user's message of this number, from 1 on; of the last one without."""
    if not number:
        return _last_question(repl)
    asked = [i for i, turn in enumerate(repl.conversation.turns) if turn.role == "user"]
    places = {str(n): place for n, place in enumerate(asked, 1)}
    if number not in places:
        known = f"/edit takes {'1 to ' if len(places) > 1 else ''}{len(places)}" if places else "none is there yet"
        raise InputError(f"there is no message {number} of yours", known)
    return places[number]


def _last_question(repl: Repl) -> int:
    question = repl.conversation.last_question
    if question is None:
        raise InputError("there is no message yet")
    return question
