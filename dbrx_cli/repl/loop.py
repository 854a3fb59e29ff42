"""Read, answer, show, again."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict

from dbrx_cli.conversation import Conversation
from dbrx_cli.engine import Done, Engine, Request
from dbrx_cli.render import Renderer, show
from dbrx_cli.render.plain import PlainRenderer
from dbrx_cli.repl.commands import run_command
from dbrx_cli.repl.signals import leaving, no_echo, one_interrupt
from dbrx_cli.repl.words import count, duration, quote
from dbrx_cli.report import Report
from dbrx_cli.session_cache import keep_cache
from dbrx_cli.store import Recorder
from model.errors import DbrxError
from model.sampling import SamplingParams

BLOCK = '"""'


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
        *,
        name: str,
        markdown: bool = True,
    ) -> None:
        self.engine = engine
        self.conversation = conversation
        self.params = params
        self.stop = stop
        self.report = report
        self.recorder = recorder
        self.name = name
        self.session_name: str | None = None
        self.markdown = markdown
        self.multiline = False
        self.files: list[str] = []  # what /read has read for the next message
        self.replies: list[Done] = []
        self.used: int | None = None  # tokens of the context, if known
        self.running = True
        self.leave_at_interrupt = False  # Ctrl-C was the last thing that was typed
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self._signal: int | None = None

    @property
    def last(self) -> Done | None:
        """How the last reply was made."""
        return self.replies[-1] if self.replies else None

    def run(self) -> None:
        """Take turns until the user leaves, the script ends, or a signal ends the program."""
        if self.interactive:
            self.report.notice(f"{self.name}, {self.engine.context} tokens of context. /help lists the commands.")
        try:
            with leaving(self._leave):
                self._loop(self._reader())
                if self._signal is None:  # it may take a while, and a signal asks for haste
                    keep_cache(self.engine, self.recorder)
        except KeyboardInterrupt:
            if self._signal is None and not self.interactive:
                raise
        finally:
            self.recorder.close()
        if self._signal is not None:
            raise SystemExit(128 + self._signal)

    def obey(self, text: str) -> None:
        """What was typed: a command, or a message."""
        if text.startswith(BLOCK):
            self.ask(text.removeprefix(BLOCK).removesuffix(BLOCK).strip("\n"))
        elif text.startswith("/"):
            run_command(self, text.replace("\\\n", "\n"))
        else:
            self.ask(text.replace("\\\n", "\n"))

    def ask(self, text: str) -> None:
        """One turn, with the files that were read for it."""
        if not text.strip():
            return
        whole = "".join(self.files) + text
        if self.answer(self.conversation.ask(whole.encode("utf-8", "replace").decode("utf-8"))):
            self.files.clear()

    def answer(self, conversation: Conversation, *, go_on: bool = False) -> bool:
        """Have a conversation answered, or its last reply continued; it takes the place of the old one then.

        A reply that is interrupted is kept as far as it came; False if nothing came.
        """
        with no_echo(), one_interrupt():
            fitted = conversation.fit(self.engine)
            self._tell_skipped(conversation, fitted)
            request = Request(fitted.messages, self.params, self.stop, continue_final=go_on)
            before = fitted.turns[-1].content if go_on else ""
            done = show(self.engine.stream(request), self._renderer(before))
        interrupted = done.finish_reason == "interrupted"
        if done.text or not interrupted:
            self.replies.append(done)
            self.used = done.usage.prompt_tokens + done.usage.completion_tokens
            self.change(fitted.extend(done.text.removeprefix(before)) if go_on else fitted.answer(done.text), done)
        if done.error is not None:
            raise done.error
        self._tell_end(done)
        if interrupted and not self.interactive:
            raise KeyboardInterrupt
        return bool(done.text)

    def change(self, conversation: Conversation, done: Done | None = None) -> None:
        """Go on with another state of the conversation, and save it. `done`: the reply that led to it."""
        self.conversation = conversation
        if done is None:
            self.used = self.engine.count(conversation.messages) if conversation.messages else 0
        self.save(done)

    def save(self, done: Done | None = None) -> None:
        """Save the session, if there is something to save."""
        if not self.conversation.turns and self.recorder.id is None:
            return
        timings = None
        if done is not None:
            timings = {"finish_reason": done.finish_reason, **asdict(done.usage), **asdict(done.timings)}
        if self.recorder.save(self.conversation.system, self.conversation.turns, timings) and self.session_name:
            self.name_session(self.session_name)

    def name_session(self, name: str) -> None:
        """Give the session a name: now, or when it is saved for the first time."""
        self.session_name = name
        if self.recorder.id is not None:
            self.session_name = None
            self.recorder.store().rename(self.recorder.id, name)

    def reading(self, conversation: Conversation, form: str = "{}") -> str:
        """How many tokens a conversation costs to read, and about how long it takes; nothing if that is not known."""
        tokens = self.engine.unread(conversation.messages)
        if tokens is None:
            return ""
        # Few tokens are read slowly, each step costs the same: the reply that read most shows the speed.
        most = max(self.replies, key=lambda done: done.usage.prompt_tokens - done.usage.cached_tokens, default=None)
        speed = most.timings.prefill_tokens_per_s if most else 0.0
        return form.format(f"{count(tokens, 'token')}{f', {duration(tokens / speed)}' if tokens and speed else ''}")

    def _loop(self, read: Callable[[], str]) -> None:
        while self.running:
            try:
                text = read()
                self.leave_at_interrupt = False
                self.obey(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.interactive or self.leave_at_interrupt:
                    raise
                self.leave_at_interrupt = True
                if self.running:
                    self.report.notice("stopped; Ctrl-C again leaves")
            except DbrxError as fault:
                if not self.interactive:
                    raise
                self.report.error(fault)

    def _leave(self, number: int) -> None:
        self._signal = number
        self.running = False

    def _tell_skipped(self, before: Conversation, after: Conversation) -> None:
        skipped = before.turns[before.skipped : after.skipped]
        if skipped:
            self.report.notice(f"the context is full; {count(len(skipped), 'message')} are no longer read:")
            for turn in skipped:
                self.report.notice(f"- {turn.role}: {quote(turn.content, self.columns - 24)}")

    def _tell_end(self, done: Done) -> None:
        if self.interactive:
            print(flush=True)  # a blank line, so that replies and questions stand apart
        if self.interactive and self.running:
            if done.finish_reason == "interrupted":
                self.leave_at_interrupt = True
                advice = "/continue goes on, " if self.engine.continues else ""
                self.report.notice(
                    f"stopped; {advice}Ctrl-C again leaves" if done.text else "stopped before the reply began"
                )
            elif done.finish_reason == "length":
                advice = "; /continue goes on" if self.engine.continues else ""
                self.report.notice(f"the reply has reached its limit{advice}")
        self.report.detail(done.summary())

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

    def _reader(self) -> Callable[[], str]:
        if self.interactive and os.environ.get("TERM") != "dumb":
            from dbrx_cli.repl.prompt import Prompt

            return Prompt(self).read
        from dbrx_cli.repl.script import ScriptReader

        return ScriptReader(prompts=self.interactive).read
