"""What Tab offers: commands, and what may come behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from dbrx_cli.repl.commands import COMMANDS
from dbrx_cli.repl.settings import NAMES, current
from model.errors import DbrxError

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl

VALUES = {
    "markdown": ("on", "off"),
    "lookup": ("auto", "off", "default"),
    "seed": ("none",),
    "stop": ("none",),
}
FILES = ("/read", "/export")


class ReplCompleter(Completer):
    """Completes the line of a slash command; a message is left alone."""

    def __init__(self, repl: Repl) -> None:
        self._repl = repl
        self._paths = PathCompleter(expanduser=True)
        self._values: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
            "/set": lambda: [(name, current(repl, name)) for name in NAMES],
            "/load": self._sessions,
            "/copy": lambda: [("code", "the last block of code")],
        }

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text.partition(" ")
        if not space:
            yield from _beginning(name, [(known, command.help) for known, command in COMMANDS.items()])
        elif name == "/set" and " " in argument:
            setting, _, value = argument.partition(" ")
            yield from _beginning(value, [(each, "") for each in VALUES.get(setting, ("default",))])
        elif name in self._values:
            yield from _beginning(argument, self._values[name]())
        elif name in FILES:
            yield from self._paths.get_completions(Document(argument), complete_event)

    def _sessions(self) -> Iterable[tuple[str, str]]:
        try:
            entries = self._repl.recorder.store().list("chat")
        except DbrxError:
            return []
        return [(entry.name or str(entry.id), entry.title) for entry in entries]


def _beginning(typed: str, offered: Iterable[tuple[str, str]]) -> Iterable[Completion]:
    for value, meaning in offered:
        if value.startswith(typed):
            yield Completion(value, start_position=-len(typed), display_meta=meaning or None)
