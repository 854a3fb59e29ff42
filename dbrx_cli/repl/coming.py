"""A reply on its way to the screen: what came of it is known and kept, whatever ends it."""

from __future__ import annotations

import time
from collections.abc import Callable

from dbrx_cli.engine import Delta, Done
from dbrx_cli.render import Renderer
from dbrx_cli.repl.signals import Signals
from model.messages import Message

EVERY_S = 2.0  # a part is kept so often, in case that nothing can be kept any more


class Coming:
    """A renderer around another one. `keep` gets the reply so far; before its end shows, all of it with its record."""

    def __init__(
        self,
        renderer: Renderer,
        before: Message,
        keep: Callable[[Message, Done | None], None],
        signals: Signals,
        *,
        often: bool,
    ) -> None:
        """before: what the reply goes on from; often: a part may be kept before the reply ends."""
        self.came = False
        self.record: Done | None = None
        self.streams = renderer.streams
        self._renderer, self._keep, self._signals, self._often = renderer, keep, signals, often
        self._before, self._texts, self._ids = before, [before.content], list(before.token_ids)
        self._due = time.monotonic()  # at the first text

    @property
    def message(self) -> Message:
        """What came, behind what there was before."""
        return Message("assistant", "".join(self._texts), tuple(self._ids))

    def delta(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        if delta.token_id is not None:
            self._ids.append(delta.token_id)
        self.came = self.came or bool(delta.text)
        if self._often and self.came and time.monotonic() >= self._due:
            self._keep(self.message, None)
            self._due = time.monotonic() + EVERY_S
        self._renderer.delta(delta)

    def done(self, done: Done) -> None:
        with self._signals.waiting():
            self.record, message = done, done.message(self._before)
            try:
                if (message.content or done.finish_reason != "interrupted") and (self._often or done.error is None):
                    self._keep(message, done)
            finally:
                self._renderer.done(done)

    def broken(self) -> None:
        self._renderer.broken()
