"""Commands that change the conversation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_cli.conversation import Conversation
from dbrx_cli.files import attached
from dbrx_cli.render.plain import safe
from dbrx_cli.repl.words import count, quote
from model.errors import InputError

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl


def regenerate(repl: Repl, argument: str) -> None:
    question = _last_question(repl)
    asked = repl.conversation.before(question + 1)
    repl.report.notice(f"another reply to {quote(asked.turns[-1].content, 30)}{repl.reading(asked, '; reads {}')}")
    if repl.params.greedy or repl.params.seed is not None:
        why = "the temperature is 0" if repl.params.greedy else f"the seed is {repl.params.seed}"
        repl.report.notice(f"{why}, so the reply will be the same; /set changes that")
    repl.answer(asked)


def go_on(repl: Repl, argument: str) -> None:
    if not repl.conversation.turns or repl.conversation.turns[-1].role != "assistant":
        raise InputError("there is no reply to go on with")
    repl.report.notice(f"going on{repl.reading(repl.conversation, '; reads {}')}")
    repl.answer(repl.conversation, go_on=True)


def edit(repl: Repl, argument: str) -> None:
    from dbrx_cli.repl.editor import edit_text

    question = _last_question(repl)
    old = repl.conversation.turns[question].content
    new = edit_text(old).strip("\n")
    if not new.strip() or new == old.strip("\n"):
        repl.report.notice("the message stays as it was")
        return
    asked = repl.conversation.before(question).ask(new)
    repl.report.line(f">>> {safe(new)}")
    if reads := repl.reading(asked, "reads {}"):
        repl.report.notice(reads)
    repl.answer(asked)


def undo(repl: Repl, argument: str) -> None:
    question = _last_question(repl)
    text = repl.conversation.turns[question].content
    repl.change(repl.conversation.before(question))
    repl.report.notice(
        f"took back {quote(text, 40)} and the reply; {count(len(repl.conversation.turns), 'message')} left"
    )


def clear(repl: Repl, argument: str) -> None:
    repl.recorder.renew()
    repl.session_name = None
    repl.files.clear()
    repl.change(Conversation(repl.conversation.system))
    repl.report.notice("new conversation")


def system(repl: Repl, argument: str) -> None:
    if argument == "default":
        changed = replace(repl.conversation, system=None)
    elif argument:
        changed = replace(repl.conversation, system=argument)
    else:
        text = repl.conversation.system
        repl.report.line("(the checkpoint's default)" if text is None else safe(text) or "(none)")
        return
    again = repl.reading(changed, "; the next message will read {}") if changed.turns else ""
    repl.change(changed)
    repl.report.notice(f"system message set{again}")


def read(repl: Repl, argument: str) -> None:
    if not argument:
        raise InputError("/read needs the name of a file", "type /read FILE")
    text = attached([str(Path(argument).expanduser())], "strict") + "\n\n"
    reads = repl.reading(repl.conversation.ask("".join([*repl.files, text])), ": reads {}")
    repl.files.append(text)
    repl.report.notice(f"{quote(argument, 30)} goes before your next message{reads}")


def _last_question(repl: Repl) -> int:
    question = repl.conversation.last_question
    if question is None:
        raise InputError("there is no message yet")
    return question
