"""A conversation that went on in several ways: an earlier message was edited, and what came after it is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dbrx_cli.repl.phrases import count, quote_message
from model.errors import InputError
from model.messages import Message

if TYPE_CHECKING:
    from dbrx_cli.conversation import Conversation
    from dbrx_cli.repl.loop import Repl


def answer_as_branch(repl: Repl, asked: Conversation) -> None:
    """Have another wording answered; the conversation as it was stays beside it, whatever happens."""
    old, number = repl.conversation, repl.branch
    repl.branches[number] = old.turns
    repl.branch = max(repl.branches) + 1
    _keep(repl)
    try:
        repl.answer(asked)
    finally:
        if repl.conversation is old:  # nothing came
            del repl.branches[number]
            repl.branch = number
            _keep(repl)
    repl.report.notice(f"this is branch {repl.branch}; /branches {number} goes back")


def branches(repl: Repl, argument: str) -> None:
    if not repl.branches:
        raise InputError("there is one branch only", "/edit N changes your Nth message, and begins another")
    if argument:
        _switch(repl, argument)
        return
    for number, turns in sorted((repl.branches | {repl.branch: repl.conversation.turns}).items()):
        start = f"{'*' if number == repl.branch else ' '}{number:>3}  {count(len(turns), 'message')}"
        parts = (
            "" if number == repl.branch else _parting(turns, repl.conversation.turns, repl.columns - len(start) - 20)
        )
        repl.report.line(start + parts)


def _switch(repl: Repl, argument: str) -> None:
    number = next((each for each in repl.branches if str(each) == argument), None)
    if number is None:
        known = ", ".join(map(str, sorted(repl.branches)))
        raise InputError(f"there is no other branch {argument}", f"there are {known}; this is {repl.branch}")
    left, turns = repl.branch, repl.branches[number]
    repl.branches[left] = repl.conversation.turns
    _keep(repl)  # in two places for a moment, and never in none
    repl.change(replace(repl.conversation, turns=turns, skipped=0))
    repl.branch = number
    del repl.branches[repl.branch]
    _keep(repl)
    reads = repl.reading(repl.conversation, "; the next message reads {}", "more token")
    repl.report.notice(f"branch {repl.branch}, {count(len(turns), 'message')}{reads}")
    repl.show_again(turns[-2:])


def _parting(turns: list[Message], current: list[Message], room: int) -> str:
    """Where a branch differs from this one."""
    pairs = enumerate(zip(turns, current, strict=False))
    at = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(turns), len(current)))
    return f", message {at // 2 + 1}: {quote_message(turns[at].content, room)}" if at < len(turns) else ""


def _keep(repl: Repl) -> None:
    with repl.signals.waiting():
        repl.recorder.save_branches(repl.branches)
