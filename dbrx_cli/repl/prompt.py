"""The prompt of the terminal: editing, history, completion, the bottom bar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent

from dbrx_cli.private import data_folder
from dbrx_cli.render.plain import safe
from dbrx_cli.repl.completion import ReplCompleter
from dbrx_cli.repl.history import PrivateHistory
from dbrx_cli.repl.loop import BLOCK
from model.errors import DbrxError

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl

MENU = 6  # rows that are kept free below a command for the menu of completions


class Prompt:
    """Reads one turn as it was typed. Enter sends; Alt-Enter, a trailing backslash or an open block makes a line."""

    def __init__(self, repl: Repl) -> None:
        self._repl = repl
        self._session: PromptSession[str] = PromptSession(
            history=_history(repl),
            completer=ReplCompleter(repl),
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            reserve_space_for_menu=MENU,
            key_bindings=self._keys(),
            multiline=True,
            prompt_continuation=lambda width, line, wraps: "" if wraps else "... ",
            bottom_toolbar=self._toolbar,
            enable_suspend=True,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
        )

    def read(self) -> str:
        """The next turn; `EOFError` on Ctrl-D, and on a second Ctrl-C where nothing was typed."""
        repl = self._repl
        while True:
            try:
                text = self._session.prompt([("bold fg:ansigreen", ">>> ")])
            except KeyboardInterrupt:
                if repl.running and self._session.default_buffer.text:
                    repl.leave_at_interrupt = False
                    continue
                if repl.leave_at_interrupt or not repl.running:
                    raise EOFError from None
                repl.leave_at_interrupt = True
                repl.report.notice("Ctrl-C again leaves, and so does Ctrl-D")
                continue
            return text

    def _toolbar(self) -> AnyFormattedText:
        repl = self._repl
        speed = f"{repl.last.timings.decode_tokens_per_s:.1f} tokens/s" if repl.last else ""
        used = f"{repl.used or 0}/{repl.engine.context} tokens"
        mode = "Alt-Enter sends" if repl.multiline else ""
        figures = "   ".join(part for part in (used, speed, mode) if part)
        name = safe(repl.name) if "/" not in repl.name.rstrip("/") else safe(Path(repl.name).name)
        room = self._session.app.output.get_size().columns - len(figures) - 5
        if len(name) > room:
            name = name[: max(0, room - 1)] + "…"
        return f" {name}   {figures}"

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            text = buffer.text
            command = text.startswith("/") and "\n" not in text
            open_block = text.startswith(BLOCK) and not (len(text) >= 2 * len(BLOCK) and text.endswith(BLOCK))
            if open_block or text.endswith("\\") or (self._repl.multiline and not command):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            if self._repl.multiline:
                event.current_buffer.validate_and_handle()
            else:
                event.current_buffer.insert_text("\n")

        return keys


def _history(repl: Repl) -> History:
    """The kept history; one that ends with the program if the file cannot be had."""
    try:
        return PrivateHistory(data_folder())
    except (DbrxError, OSError) as fault:
        why = fault.one_line if isinstance(fault, DbrxError) else fault.strerror
        repl.report.notice(f"what you type is not kept: {why}")
        return InMemoryHistory()
