"""The prompt of the terminal: editing, history, completion, the bottom bar."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.input.typeahead import clear_typeahead, store_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPress
from prompt_toolkit.key_binding.bindings.named_commands import get_by_name
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output.color_depth import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.styles import Style

from dbrx_cli.private import data_folder
from dbrx_cli.repl.commands import COMMANDS
from dbrx_cli.repl.completion import ReplCompleter
from dbrx_cli.repl.history import PrivateHistory
from dbrx_cli.repl.lines import BLOCK, Block, Line, typed
from dbrx_cli.repl.phrases import count, words
from dbrx_cli.repl.typeahead import PASTE, PASTED
from model.errors import DbrxError
from model.foreign_text import on_one_line
from model.messages import Message

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl

FOLDED_LINES, FOLDED_LENGTH = 20, 5000  # a longer paste is shown as how long it is
PLACEHOLDER = "Send a message, or /help"
# No colours but the terminal's own: it may be light or dark.
STYLE = Style.from_dict(
    {
        "placeholder": "fg:ansibrightblack",
        "bottom-toolbar": "noreverse fg:ansibrightblack",
        "completion-menu": "bg:default fg:default",
        "completion-menu.completion": "bg:default fg:default",
        "completion-menu.completion.current": "reverse",
        "completion-menu.meta.completion": "bg:default fg:ansibrightblack",
        "completion-menu.meta.completion.current": "noreverse bold",
        "scrollbar.background": "bg:default",
        "scrollbar.button": "reverse",
    }
)
MENU = 8  # rows that are kept free below a command for the menu of completions
CURSOR = re.compile(r"\x1b\[(\d+);\d+R")  # where a terminal says it is


class Prompt:
    """Reads one turn. Enter sends; Alt-Enter, a backslash or an open block makes a line; a paste stays as it is."""

    def __init__(self, repl: Repl) -> None:
        self._repl = repl
        self._pasted = ""  # what the text begins with, if that was pasted: neither a block nor a command of many lines
        self._cut = False  # a paste began before the prompt, and ends at it
        self._folded: dict[str, str] = {}  # long pastes, by what stands for them
        self._sent: dict[str, Line] = {}  # what is in the history and cannot be typed as it was sent
        self._backslash = ""  # the text as it was when a backslash was typed
        self._input = Vt100Input(sys.stdin)
        self._session: PromptSession[Line] = PromptSession(
            input=self._input,
            output=_Output.from_pty(sys.stdout, os.environ.get("TERM"), ColorDepth.from_env()),
            history=_history(repl),
            completer=ReplCompleter(repl),
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            reserve_space_for_menu=MENU,
            key_bindings=self._keys(),
            multiline=True,
            prompt_continuation=lambda width, line, wraps: "" if wraps else "... ",
            bottom_toolbar=self._toolbar,
            placeholder=self._placeholder,
            style=STYLE,
            enable_suspend=True,
        )
        self._session.default_buffer.on_text_changed += self._emptied

    def read(self) -> Line:
        """The next turn; `EOFError` on Ctrl-D, and on a second Ctrl-C where nothing was typed."""
        repl = self._repl
        while True:
            self._pasted = self._backslash = ""
            self._folded.clear()
            try:
                with repl.typed.left_to_prompt() as before, repl.signals.heard():
                    self._cut = before.rfind(PASTE) > before.rfind(PASTED)
                    self._feed(before)
                    return self._session.prompt([("bold fg:ansigreen", ">>> ")])
            except KeyboardInterrupt:
                if repl.running and self._session.default_buffer.text:
                    repl.leave_at_interrupt = False
                    continue
                if repl.in_haste and repl.running:
                    continue
                if repl.leave_at_interrupt or not repl.running:
                    raise EOFError from None
                repl.leave_at_interrupt = True
                repl.report.notice("Ctrl-C again leaves, and so does Ctrl-D")

    def drop(self) -> None:
        """Forget what was typed ahead."""
        clear_typeahead(self._input)

    def remember(self, text: str) -> None:
        """Let Up bring a message that was written elsewhere."""
        self._remember(text, Line(text))

    def _remember(self, text: str, line: Line) -> None:
        text = next((each for each in (text, f"{BLOCK}{text}{BLOCK}") if _whole(each) == line), f" {text}")
        if _whole(text) != line:  # in a later run, it is sent with the space
            self._sent[text] = line
        history = self._session.history
        if text and text not in history.get_strings()[-1:]:
            history.append_string(text)

    def _feed(self, data: bytes) -> None:
        """Take what was typed before as if it were typed now."""
        keys: list[KeyPress] = []
        parser = self._input.vt100_parser
        parser.feed_key_callback, own = keys.append, parser.feed_key_callback
        parser.feed(data.decode(errors="surrogateescape"))
        parser.feed_key_callback = own
        store_typeahead(self._input, keys)

    def _placeholder(self) -> AnyFormattedText:
        """In an empty prompt, before the first message."""
        new = not self._repl.conversation.turns and not get_app().is_done
        return [("class:placeholder", PLACEHOLDER)] if new else ""

    def _toolbar(self) -> AnyFormattedText:
        repl = self._repl
        speeds = [each for done in repl.replies if (each := done.timings.decode_tokens_per_s)]
        speed = f"{speeds[-1]:.1f} tokens/s" if speeds else ""
        used = f"{repl.used or 0}/{repl.engine.context} tokens"
        mode = "Alt-Enter sends" if repl.multiline else ""
        figures = "   ".join(part for part in (used, speed, mode) if part)
        name = on_one_line(repl.name) if "/" not in repl.name.rstrip("/") else on_one_line(Path(repl.name).name)
        room = self._session.app.output.get_size().columns - len(figures) - 5
        if len(name) > room:
            name = name[: max(0, room - 1)] + "…"
        return f" {name}   {figures}"

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        at_prompt = has_focus(DEFAULT_BUFFER)

        @keys.add("enter", filter=at_prompt)
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            text = self._whole(buffer)
            line = self._line(text)
            if buffer.text and buffer.text == self._backslash and buffer.document.is_cursor_at_the_end:
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            elif line is None or (self._repl.multiline and (not line.command or "\n" in text)):
                buffer.insert_text("\n")
            else:
                self._send(line, buffer)

        @keys.add("escape", "enter", filter=at_prompt)
        def _(event: KeyPressEvent) -> None:
            if self._repl.multiline:
                self._send(self._line(self._whole(event.current_buffer)), event.current_buffer)
            else:
                event.current_buffer.insert_text("\n")

        @keys.add("\\", filter=at_prompt)
        def _(event: KeyPressEvent) -> None:
            get_by_name("self-insert").call(event)
            self._backslash = event.current_buffer.text

        @keys.add(Keys.BracketedPaste)
        def _(event: KeyPressEvent) -> None:
            buffer, text = event.current_buffer, event.data.replace("\r\n", "\n").replace("\r", "\n")
            if self._cut:  # amid the paste the terminal told where the cursor is, as the prompt had asked
                for row in CURSOR.findall(text):
                    event.app.renderer.report_absolute_cursor_row(int(row))
                text, self._cut = CURSOR.sub("", text), False
            begins = buffer.name == DEFAULT_BUFFER and buffer.cursor_position == 0
            if begins and not buffer.text and (path := dropped_file(text)):
                buffer.insert_text(f"/read {path}")
                return
            buffer.insert_text(self._fold(text) if buffer.name == DEFAULT_BUFFER else text)
            if begins:
                self._pasted = text[: len(BLOCK)]
            self._backslash = ""

        @keys.add("c-x", "c-e", filter=at_prompt)
        def _(event: KeyPressEvent) -> None:
            run_in_terminal(lambda: self._edit(event.current_buffer))

        return keys

    def _line(self, text: str) -> Line | None:
        """What Enter sends; None while a block is open."""
        if self._pasted and text.startswith(self._pasted):
            words = text.split(maxsplit=1)
            return Line(text, bool(words) and words[0] in COMMANDS and "\n" not in text.strip())
        return self._sent.get(text) or _whole(text)

    def _send(self, line: Line | None, buffer: Buffer) -> None:
        text = self._whole(buffer)
        line = line or Line(text)
        self._remember(text, line)
        get_app().exit(result=line)

    def _edit(self, buffer: Buffer) -> None:
        """The text in the user's editor and back, unsent; a fault leaves it as it was."""
        from dbrx_cli.repl.editor import edit_text

        try:
            text = edit_text(self._whole(buffer)).removesuffix("\n")
        except DbrxError as fault:
            self._repl.report.error(fault)
            return
        if text != buffer.text:
            buffer.document = Document(text, len(text))

    def _fold(self, text: str) -> str:
        """What stands in the prompt for a paste: itself, if it is short."""
        lines = text.count("\n") + 1
        if lines <= FOLDED_LINES and len(text) <= FOLDED_LENGTH:
            return text
        tokens = self._repl.engine.count([Message("user", text)])
        number = f" #{len(self._folded) + 1}" if self._folded else ""
        mark = f"[{count(lines, 'line')}, {tokens:,} tokens{number}]"
        self._folded[mark] = text
        return mark

    def _whole(self, buffer: Buffer) -> str:
        """The text with what was pasted in it."""
        text = buffer.text
        for mark, pasted in self._folded.items():
            text = text.replace(mark, pasted)
        return text

    def _emptied(self, buffer: Buffer) -> None:
        if not buffer.text:
            self._pasted = ""
            self._folded.clear()


class _Output(Vt100_Output):
    """Pastes stay marked when the prompt ends, since they may come while a reply does (see `typeahead`)."""

    def disable_bracketed_paste(self) -> None:
        if not get_app().is_done:
            super().disable_bracketed_paste()


def _whole(text: str) -> Line | None:
    """What a text means that was typed; None while a block is open."""
    return None if text.startswith(BLOCK) and Block(text).open else typed(text)


def dropped_file(text: str) -> str | None:
    """The file that was dropped on the window: terminals paste its path quoted, escaped or as a URL."""
    text = text.strip(" ")
    if text.startswith("file://"):
        path = unquote(urlsplit(text).path)
    else:
        path = parts[0] if len(parts := words(text)) == 1 else text
    return path if path.startswith("/") and "\n" not in path and os.path.isfile(path) else None


def _history(repl: Repl) -> History:
    """The kept history; one that ends with the program if the file cannot be had."""
    try:
        return PrivateHistory(data_folder())
    except (DbrxError, OSError) as fault:
        why = fault.one_line if isinstance(fault, DbrxError) else fault.strerror
        repl.report.notice(f"what you type is not kept: {why}")
        return InMemoryHistory()
