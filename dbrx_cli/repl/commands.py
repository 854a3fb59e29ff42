"""What a line that begins with a slash does."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl


@dataclass(frozen=True)
class Command:
    """A slash command: what it does and how it is explained."""

    run: Callable[[Repl, str], None]
    usage: str
    help: str


def run_command(repl: Repl, line: str) -> None:
    """Obey a line such as `/system You are brief.`; an unknown command gets a suggestion."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else "/help lists the commands"
        repl.report.notice(f"there is no command {name}; {advice}")
        return
    command.run(repl, argument.strip())


def _help(repl: Repl, argument: str) -> None:
    shown = {command.usage: command.help for command in COMMANDS.values()}
    width = max(map(len, shown))
    for usage, text in shown.items():
        repl.report.line(f"{usage:{width}}  {text}")
    repl.report.line('Alt-Enter, a trailing \\ or """ opens more lines. Ctrl-C stops a reply, Ctrl-D leaves.')


def _leave(repl: Repl, argument: str) -> None:
    repl.running = False


def _clear(repl: Repl, argument: str) -> None:
    repl.conversation.clear()
    repl.last = None
    repl.report.notice("new conversation")


def _system(repl: Repl, argument: str) -> None:
    if argument:
        repl.conversation.system = argument
        repl.report.notice("system message set; the conversation so far is read again under it")
    else:
        repl.report.line(repl.conversation.system or "(the checkpoint's default)")


COMMANDS = {
    "/help": Command(_help, "/help, /?", "this list"),
    "/clear": Command(_clear, "/clear", "start a new conversation"),
    "/system": Command(_system, "/system [TEXT]", "show or set the system message"),
    "/exit": Command(_leave, "/exit, /quit, /bye", "leave"),
}
COMMANDS |= {"/?": COMMANDS["/help"], "/quit": COMMANDS["/exit"], "/bye": COMMANDS["/exit"]}
