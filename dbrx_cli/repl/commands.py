"""What a line that begins with a slash does: the table of commands."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbrx_cli.repl import branches, settings
from dbrx_cli.repl import conversation_commands as conversation
from dbrx_cli.repl import session_commands as session
from dbrx_cli.repl import stats_commands as stats
from dbrx_cli.repl.phrases import quote
from model.errors import InputError

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl

KEYS = {
    "Enter": "sends",
    'Alt-Enter, \\, """': 'a new line; a \\ at the end and Enter, too; between two """ all lines',
    "Ctrl-C": "stops a reply and drops what waits; clears what was typed",
    "Ctrl-D": "leaves",
    "Up, Ctrl-R": "what was typed before, and a search in it",
    "Tab": "completes commands, names and files",
    "Ctrl-X Ctrl-E": "opens the editor, and brings its text back to the prompt",
}
# The order of /help.
GROUPS = {
    "Talk": "/regen /continue /edit /branches /undo /clear /system /read /multiline",
    "Keep": "/copy /save /load /sessions /export",
    "Settings": "/set /show",
    "Look inside": "/tokens /stats /trace",
    "The program": "/help /exit",
}


@dataclass(frozen=True)
class Command:
    """A slash command: what it does and how it is explained."""

    run: Callable[[Repl, str], None]
    usage: str
    help: str

    @property
    def takes_argument(self) -> bool:
        """Whether its usage names one."""
        return any(" " in form for form in self.usage.split(", "))


def run_command(repl: Repl, line: str) -> None:
    """Obey a line such as `/system You are brief.`; what is no command, or asks one for too much, gets a suggestion."""
    name, *rest = line.split(maxsplit=1)
    argument = rest[0].strip() if rest else ""
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        wrong, advice = (
            f"there is no command {name}",
            f"did you mean {near[0]}?" if near else "/help lists the commands",
        )
    elif argument and not command.takes_argument:
        wrong = f"{name} takes nothing behind it, and there is {quote(argument, 40)}"
        advice = f"type {name}"
    else:
        command.run(repl, argument)
        return
    repl.report.error(InputError(wrong, f"{advice} (a message may begin with a space)"))


def _help(repl: Repl, argument: str) -> None:
    for group, names in GROUPS.items():
        repl.report.line(f"\n{group}")
        repl.table({COMMANDS[name].usage: COMMANDS[name].help for name in names.split()})
    repl.report.line("\nKeys")
    repl.table(KEYS)


def _leave(repl: Repl, argument: str) -> None:
    repl.leave()


COMMANDS = {
    "/help": Command(_help, "/help, /?", "this list"),
    "/regen": Command(conversation.regenerate, "/regen", "another reply to your last message"),
    "/continue": Command(conversation.go_on, "/continue", "go on with the last reply"),
    "/edit": Command(
        conversation.edit,
        "/edit [N]",
        "change your last message, or your Nth, in $EDITOR; the old one stays a branch",
    ),
    "/branches": Command(branches.branches, "/branches [N]", "list the branches, or go to one"),
    "/undo": Command(conversation.undo, "/undo", "take back your last message and its reply, or the last /read"),
    "/clear": Command(conversation.clear, "/clear", "start a new conversation"),
    "/system": Command(
        conversation.system, "/system [TEXT]", "show or set the system message; `default`: the checkpoint's"
    ),
    "/read": Command(
        conversation.read,
        "/read [FILE]",
        "put a text file before your next message; `-`: drop those that wait",
    ),
    "/set": Command(settings.assign, "/set NAME VALUE", "change a setting; /set lists them"),
    "/show": Command(settings.show, "/show", "the model and the settings"),
    "/multiline": Command(settings.multiline, "/multiline", "Enter makes a new line, Alt-Enter sends; again: back"),
    "/copy": Command(session.copy, "/copy [code]", "copy the last reply, or its last block of code"),
    "/save": Command(session.save, "/save [NAME]", "save the session, under a name"),
    "/load": Command(session.load, "/load NAME", "take up a session by its name or number"),
    "/sessions": Command(session.sessions, "/sessions", "list the sessions"),
    "/export": Command(session.export, "/export FILE", "write the conversation as Markdown (.md) or JSON (.json)"),
    "/tokens": Command(stats.tokens, "/tokens", "how much of the context is used"),
    "/stats": Command(stats.stats, "/stats", "speed and tokens of the replies"),
    "/trace": Command(stats.trace, "/trace", "which experts the last reply was made by"),
    "/exit": Command(_leave, "/exit, /quit, /bye", "leave"),
}
COMMANDS |= {"/?": COMMANDS["/help"], "/quit": COMMANDS["/exit"], "/bye": COMMANDS["/exit"]}
