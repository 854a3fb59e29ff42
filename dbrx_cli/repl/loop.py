"""Read, answer, show, again."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from textwrap import wrap
from typing import Any, Protocol

from dbrx_cli.conversation import Conversation
from dbrx_cli.engine import NOTHING, Delta, Done, Engine, Request
from dbrx_cli.files import apart
from dbrx_cli.options import DEMOS
from dbrx_cli.output import say
from dbrx_cli.render import Renderer, show
from dbrx_cli.render.plain import PlainRenderer
from dbrx_cli.repl.coming import Coming
from dbrx_cli.repl.commands import run_command
from dbrx_cli.repl.lines import Line
from dbrx_cli.repl.phrases import count, duration, quote_message
from dbrx_cli.repl.signals import Signals
from dbrx_cli.repl.typeahead import Typeahead, edits_lines
from dbrx_cli.report import Report
from dbrx_cli.session_cache import keep_cache
from dbrx_cli.store import Recorder
from model.errors import ContextError, DbrxError
from model.messages import Message
from model.sampling import SamplingParams

HASTE_S = 0.5
NARROW = 70  # columns below which a name and its explanation do not fit on one line
WELCOME = "Enter sends, Ctrl-C stops, Ctrl-D leaves, Tab completes, /help lists more"  # fits 80 columns


class Reader(Protocol):
    """Reads what the user types."""

    def read(self) -> Line:
        """The next turn; `EOFError` at the end."""

    def drop(self) -> None:
        """Forget what was typed ahead."""

    def remember(self, text: str) -> None:
        """Offer a message again that was written elsewhere."""


class Repl:
    """One chat with one engine."""

    def __init__(
        self,
        engine: Engine,
        conversation: Conversation,
        params: SamplingParams,
        stop: tuple[str, ...],
        report: Report,
        recorder: Recorder,
        signals: Signals,
        typed: Typeahead,
        *,
        name: str,
        asked: str,
        again: str = "dbrx chat",
        markdown: bool = True,
    ) -> None:
        """name: the model; asked: as it was asked for, which a server may call otherwise; again: the command line."""
        self.engine = engine
        self.conversation = conversation
        self.params = params
        self.stop = stop
        self.report = report
        self.recorder = recorder
        self.signals = signals
        self.typed = typed
        self.name = name
        self.asked = asked
        self.again = again
        self.session_name: str | None = None
        self.markdown = markdown
        self.multiline = False
        self.files: dict[str, str] = {}  # what /read has read for the next message, by its name
        self.replies: list[Done] = []
        self.answered: Request | None = None  # what the last reply answers; None if that was interrupted
        self.branches: dict[int, list[Message]] = {}  # other ways in which the conversation went on, by number
        self.branch = 1  # the number of this one
        self.ended = False  # the model ended the last reply by itself
        self.used: int | None = None  # tokens of the context, if known
        self._running = True
        self._unsaved = False
        self.leave_at_interrupt = False  # Ctrl-C was the last thing that was typed
        self.stopped_at = float("-inf")  # when one stopped a reply
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()

    @property
    def last(self) -> Done | None:
        """How the last reply was made."""
        return self.replies[-1] if self.replies else None

    @property
    def running(self) -> bool:
        """False once the user or a signal has ended the chat."""
        return self._running and self.signals.ending is None

    @property
    def in_haste(self) -> bool:
        """Ctrl-C has just stopped a reply: another one is the same wish, and no wish to leave."""
        return time.monotonic() - self.stopped_at < HASTE_S

    def leave(self) -> None:
        """End the chat."""
        self._running = False

    def welcome(self) -> None:
        """What one talks with, and the keys."""
        if self.interactive:
            toy = "; a toy: quick, and often wrong" if self.name in DEMOS else ""
            self.report.notice(f"{self.name}, {self.engine.context:,} tokens of context{toy}")
            self.report.notice(WELCOME)

    def run(self) -> None:
        """Take turns until the user leaves, the script ends, or a signal ends the program."""
        try:
            self._loop()
            if self.signals.ending is None:  # it may take a while, and a signal asks for haste
                with self.signals.heard():
                    keep_cache(self.engine, self.recorder, self.report)
        except KeyboardInterrupt:
            if self.signals.ending is None and not self.interactive:
                raise
        finally:
            if self._unsaved:
                self.save()
            if self.interactive and self.signals.ending is None:
                self._tell_kept()
            self.recorder.close()

    def obey(self, line: Line) -> None:
        """What was typed: a command, or a message."""
        if line.command:
            with self.signals.heard():
                run_command(self, line.text)
        else:
            self.ask(line.text)

    def ask(self, text: str) -> None:
        """One turn, with the files that were read for it."""
        if not text.strip():
            return
        before = self.conversation
        whole = "".join([*self.files.values(), text])
        try:
            self.answer(before.ask(whole.encode("utf-8", "replace").decode("utf-8")))
        except ContextError as fault:
            if not self.files:
                raise
            raise ContextError(fault.message, "`/read -` drops the files before it") from None
        finally:
            if self.conversation is not before:
                self.files.clear()

    def answer(self, conversation: Conversation, *, go_on: bool = False) -> None:
        """Have a conversation answered, or its last reply continued; it takes the place of the old one then.

        What came of a reply is kept if it is interrupted, or ends with a fault that is raised then; but only a reply
        that was asked for anew gives way to a part of another one, and to none that a fault ended.
        """
        grows = conversation.turns[: len(self.conversation.turns)] == self.conversation.turns
        fault: KeyboardInterrupt | Exception | None = None
        coming: Coming | None = None
        with self.signals.waiting():
            try:
                with self.signals.heard():
                    if self.interactive:
                        say("")  # a blank line, so that questions and replies stand apart
                    with self.report.status("reading", self._reading_speed) as status:
                        self.recorder.prepare()
                        fitted = conversation.fit(self.engine)
                        self._tell_skipped(conversation, fitted)
                        before = fitted.turns[-1] if go_on else NOTHING
                        renderer = self._renderer(before.content)
                        coming = Coming(renderer, before, partial(self._keep, fitted), self.signals, often=grows)
                        request = Request(fitted.messages, self.params, self.stop, go_on, on_read=status.read)
                        show(self.engine.stream(request), coming, status)
            except (KeyboardInterrupt, Exception) as error:
                fault = error
                if coming and not coming.record and coming.came and (grows or isinstance(error, KeyboardInterrupt)):
                    self._keep(fitted, coming.message)
            record, came = (coming.record, coming.came) if coming else (None, False)
            if record is not None and record.error is not None:
                fault = record.error
            if isinstance(fault, Exception):
                if came and grows:
                    self.report.notice("what came of the reply is kept")
                raise fault
            # An interrupt may also come when the reply is complete already.
            interrupted = fault is not None or record is None or record.finish_reason == "interrupted"
            self.answered = None if interrupted else request
            if interrupted:
                self.reader.drop()
            self._tell_end(record, came)
            if go_on and not came and not interrupted:
                self.report.notice("nothing was added: the model ends its reply here")
            if interrupted and not self.interactive:
                raise KeyboardInterrupt

    def change(self, conversation: Conversation) -> None:
        """Go on with another state of the conversation, and save it."""
        with self.signals.waiting():
            self.conversation, self.ended = conversation, False
            self.used = self.engine.count(conversation.messages) if conversation.messages else 0
            self.save()

    def save(self, timings: Mapping[str, Any] | None = None) -> None:
        """Save the session, if there is something to save. timings: of the reply that it ends with."""
        if not self.conversation.turns and self.recorder.id is None:
            return
        with self.signals.waiting():
            saved = self.recorder.save(self.conversation.system, self.conversation.turns, timings)
            self._unsaved = not saved
            if saved and self.session_name:
                self.name_session(self.session_name)

    def name_session(self, name: str) -> None:
        """Give the session a name: now, or when it is saved for the first time."""
        self.session_name = name
        if self.recorder.id is not None:
            self.session_name = None
            self.recorder.store().rename(self.recorder.id, name)

    def reading(self, conversation: Conversation, form: str = "{}", thing: str = "token") -> str:
        """How many tokens a conversation costs to read, and about how long it takes; nothing if that is not known."""
        tokens = self.engine.unread(conversation.messages)
        if tokens is None:
            return ""
        speed = self._reading_speed
        return form.format(f"{count(tokens, thing)}{f', {duration(tokens / speed)}' if tokens and speed else ''}")

    @property
    def _reading_speed(self) -> float:
        """Tokens a second; 0 if nothing was read yet."""
        # Few tokens are read slowly, each step costs the same: the reply that read most shows the speed.
        most = max(self.replies, key=lambda done: done.usage.prompt_tokens - done.usage.cached_tokens, default=None)
        return most.timings.prefill_tokens_per_s if most else 0.0

    def _keep(self, conversation: Conversation, reply: Message, record: Done | None = None) -> None:
        """Take a reply, or as much of it as came, into the conversation, and save it."""
        self.conversation = conversation.answer(reply)
        self.ended = record is not None and record.finish_reason == "stop"
        if record is None:
            self.save({"finish_reason": "interrupted"})
            return
        self.replies.append(record)
        self.used = record.usage.prompt_tokens + record.usage.completion_tokens
        self.save({"finish_reason": record.finish_reason, **asdict(record.usage), **asdict(record.timings)})

    def _loop(self) -> None:
        while self.running:
            try:
                line = self.reader.read()
                self.leave_at_interrupt = False
                self.obey(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.reader.drop()
                if not self.interactive or self.leave_at_interrupt:
                    raise
                self.leave_at_interrupt = True
                if self.running:
                    self.report.notice("stopped; Ctrl-C again leaves")
            except DbrxError as fault:
                if not self.interactive:
                    raise
                self.report.error(fault)

    def _tell_kept(self) -> None:
        """Where the conversation is, and how to go on with it."""
        if self.recorder.id is not None and self.recorder.enabled and self.conversation.turns and not self._unsaved:
            self.report.notice(f"kept as session {self.recorder.id}; to go on: {self.again} -c")

    def _tell_skipped(self, before: Conversation, after: Conversation) -> None:
        skipped = before.turns[before.skipped : after.skipped]
        if skipped:
            self.report.notice(f"the context is full; {count(len(skipped), 'message')} are no longer read:")
            for turn in skipped:
                self.report.notice(f"- {turn.role}: {quote_message(turn.content, self.columns - 24)}")

    def _tell_end(self, record: Done | None, came: bool) -> None:
        """After a reply; without a record, it was interrupted."""
        if self.interactive and came:
            say("")
        if self.interactive and self.running:
            if record is None or record.finish_reason == "interrupted":
                self.leave_at_interrupt, self.stopped_at = True, time.monotonic()
                advice = "/continue goes on, " if self.engine.continues else ""
                self.report.notice(
                    f"stopped; {advice}Ctrl-C again leaves" if came else "stopped before the reply began"
                )
            elif record.finish_reason == "length":
                advice = "; /continue goes on" if self.engine.continues else ""
                self.report.notice(f"the reply has reached its limit{advice}")
        if record is not None:
            self.report.detail(record.summary())

    def show_again(self, turns: Sequence[Message]) -> None:
        """Messages of an earlier run, as they were seen then."""
        if not self.interactive:
            return
        for turn in turns:
            if turn.role == "user":
                names, own = apart(turn.content)
                self.report.line(f">>> {''.join(f'[{name}] ' for name in names)}{own}\n")
            else:
                renderer = self._renderer("")
                renderer.delta(Delta(turn.content, None))
                renderer.broken()
                say("")

    def table(self, rows: Mapping[str, str]) -> None:
        """Names and what is said of each, wrapped by words; on a narrow window below each other."""
        width = max(map(len, rows)) + 2
        for name, text in rows.items():
            beside = self.columns >= NARROW or width + len(text) < self.columns
            indent = " " * (width if beside else 4)
            self.tell(text, f"{name:{width}}" if beside else f"{name}\n{indent}", indent)

    def tell(self, text: str, start: str = "", indent: str = "") -> None:
        """An answer, wrapped by words. start: what stands before it; indent: before its further lines."""
        room = max(20, self.columns - 1 - len(indent))
        lines = wrap(text, room, break_on_hyphens=False, break_long_words=False) or [""]
        self.report.line(start + f"\n{indent}".join(lines))

    @property
    def columns(self) -> int:
        """Of the terminal."""
        return shutil.get_terminal_size().columns

    def _renderer(self, before: str) -> Renderer:
        if self.interactive and self.markdown:
            from dbrx_cli.render.markdown import MarkdownRenderer, suits

            if suits(sys.stdout):
                return MarkdownRenderer(before=before)
        return PlainRenderer()

    @cached_property
    def reader(self) -> Reader:
        """Where the user's lines come from."""
        if edits_lines():
            from dbrx_cli.repl.prompt import Prompt

            return Prompt(self)
        from dbrx_cli.repl.script import ScriptReader

        return ScriptReader(self)
