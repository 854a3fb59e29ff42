"""Read, answer, show, again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from dbrx_cli.conversation import Conversation
from dbrx_cli.engine import Done, Engine, Request
from dbrx_cli.render import show
from dbrx_cli.render.plain import PlainRenderer
from dbrx_cli.repl.commands import run_command
from dbrx_cli.report import Report
from model.errors import DbrxError
from model.sampling import SamplingParams


class Repl:
    """One chat with one engine."""

    def __init__(
        self,
        engine: Engine,
        conversation: Conversation,
        params: SamplingParams,
        stop: tuple[str, ...],
        report: Report,
        *,
        name: str,
    ) -> None:
        self.engine = engine
        self.conversation = conversation
        self.params = params
        self.stop = stop
        self.report = report
        self.name = name
        self.last: Done | None = None
        self.running = True
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Take turns until the user leaves or the script ends."""
        if self.interactive:
            self.report.notice(f"{self.name}, {self.engine.context} tokens of context. /help lists the commands.")
        for text in self._inputs():
            if text.startswith("/"):
                run_command(self, text)
            elif text.strip():
                self.ask(text)
            if not self.running:
                return

    def ask(self, text: str) -> None:
        """One turn. A reply that is interrupted is kept as far as it came; a fault gives the question back."""
        self.conversation.ask(text)
        try:
            dropped = self.conversation.fit(self.engine)
            if dropped:
                self.report.notice(f"the context is full: {len(dropped)} of the oldest messages are no longer read")
            request = Request(self.conversation.messages, self.params, self.stop)
            self.last = show(self.engine.stream(request), PlainRenderer())
        except (DbrxError, KeyboardInterrupt) as error:
            self.conversation.take_back()
            if not self.interactive:
                raise
            if isinstance(error, DbrxError):
                self.report.error(error)
            return
        self.conversation.answer(self.last.text)
        if self.last.finish_reason == "interrupted" and not self.interactive:
            raise KeyboardInterrupt
        self.report.detail(self.last.summary())

    def _inputs(self) -> Iterator[str]:
        read = self._reader()
        while True:
            try:
                yield read()
            except EOFError:
                return

    def _reader(self) -> Callable[[], str]:
        if self.interactive:
            from dbrx_cli.repl.prompt import Prompt

            return Prompt(self).read
        from dbrx_cli.repl.script import ScriptReader

        return ScriptReader().read
