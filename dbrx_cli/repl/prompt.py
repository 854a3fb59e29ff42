"""The prompt of the terminal: editing, history, completion, the bottom bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import HTML, AnyFormattedText
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent

from dbrx_cli.repl.commands import COMMANDS

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl

BLOCK = '"""'


class Prompt:
    """Reads one turn. Enter sends; Alt-Enter, a trailing backslash or an open block starts a new line."""

    def __init__(self, repl: Repl) -> None:
        self._repl = repl
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(),
            completer=WordCompleter(sorted(COMMANDS), sentence=True),
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="... ",
            bottom_toolbar=self._toolbar,
            enable_suspend=True,
        )

    def read(self) -> str:
        """The next turn; `EOFError` on Ctrl-D, and on Ctrl-C where nothing was typed."""
        while True:
            try:
                text = self._session.prompt(">>> ")
            except KeyboardInterrupt:
                if self._session.default_buffer.text:
                    continue
                raise EOFError from None
            if text.startswith(BLOCK):
                return text.removeprefix(BLOCK).removesuffix(BLOCK).strip("\n")
            return text.replace("\\\n", "\n")

    def _toolbar(self) -> AnyFormattedText:
        repl = self._repl
        used = speed = ""
        if repl.last:
            usage = repl.last.usage
            used = f"  {usage.prompt_tokens + usage.completion_tokens}/{repl.engine.context} tokens"
            speed = f"  {repl.last.timings.decode_tokens_per_s:.1f} tokens/s"
        return HTML("{}{}{}").format(repl.name, used, speed)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = buffer.text
        open_block = text.startswith(BLOCK) and not (len(text) >= 6 and text.endswith(BLOCK))
        if open_block or text.endswith("\\"):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
