"""What a line that begins with a slash does: the table of commands."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from dbrx_cli.repl import figures, keeping, settings, talking

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl

KEYS = (
    'Enter sends. Alt-Enter, a trailing \\ or """ opens more lines. Ctrl-C stops a reply, Ctrl-R searches what you '
    "typed before, Ctrl-X Ctrl-E opens the editor, Ctrl-D leaves."
)
NARROW = 70  # columns below which a command and its explanation do not fit on one line


@dataclass(frozen=True)
class Command:
    """A slash command: what it does and how it is explained."""

    run: Callable[[Repl, str], None]
    usage: str
    help: str


def run_command(repl: Repl, line: str) -> None:
    """Obey a line such as `/system You are brief.`; an unknown command gets a suggestion."""
    name, *rest = line.split(maxsplit=1)
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else "/help lists the commands"
        repl.report.notice(f"there is no command {name}; {advice} (a message may begin with a space)")
        return
    command.run(repl, rest[0].strip() if rest else "")


def _help(repl: Repl, argument: str) -> None:
    shown = {command.usage: command.help for command in COMMANDS.values()}
    width = max(map(len, shown))
    for usage, text in shown.items():
        if repl.columns < NARROW:
            repl.report.line(
                f"{usage}\n{fill(text, repl.columns - 1, initial_indent='    ', subsequent_indent='    ')}"
            )
        else:
            repl.report.line(f"{usage:{width}}  {text}")
    repl.report.line(fill(KEYS, min(80, repl.columns - 1)))


def _leave(repl: Repl, argument: str) -> None:
    repl.leave()


COMMANDS = {
    "/help": Command(_help, "/help, /?", "this list"),
    "/regen": Command(talking.regenerate, "/regen", "another reply to your last message"),
    "/continue": Command(talking.go_on, "/continue", "go on with the last reply"),
    "/edit": Command(talking.edit, "/edit", "change your last message in $EDITOR, and have it answered again"),
    "/undo": Command(talking.undo, "/undo", "take back your last message and its reply, or the last /read"),
    "/clear": Command(talking.clear, "/clear", "start a new conversation"),
    "/system": Command(talking.system, "/system [TEXT]", "show or set the system message; `default`: the checkpoint's"),
    "/read": Command(
        talking.read, "/read [FILE]", "put a text file before your next message; `-`: drop those that wait"
    ),
    "/set": Command(settings.assign, "/set NAME VALUE", "change a setting; /set lists them"),
    "/show": Command(settings.show, "/show", "the model and the settings"),
    "/multiline": Command(settings.multiline, "/multiline", "Enter makes a new line, Alt-Enter sends; again: back"),
    "/copy": Command(keeping.copy, "/copy [code]", "copy the last reply, or its last block of code"),
    "/save": Command(keeping.save, "/save [NAME]", "save the session, under a name"),
    "/load": Command(keeping.load, "/load NAME", "take up a session by its name or number"),
    "/sessions": Command(keeping.sessions, "/sessions", "list the sessions"),
    "/export": Command(keeping.export, "/export FILE", "write the conversation as Markdown (.md) or JSON (.json)"),
    "/tokens": Command(figures.tokens, "/tokens", "how much of the context is used"),
    "/stats": Command(figures.stats, "/stats", "speed and tokens of the replies"),
    "/trace": Command(figures.trace, "/trace", "which experts the last reply was made by"),
    "/exit": Command(_leave, "/exit, /quit, /bye", "leave"),
}
COMMANDS |= {"/?": COMMANDS["/help"], "/quit": COMMANDS["/exit"], "/bye": COMMANDS["/exit"]}
