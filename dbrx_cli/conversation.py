"""The turns of a chat as they grow, and what gives way when the context is full."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace

from dbrx_cli.engine import Engine
from model.errors import ContextError
from model.messages import Message


@dataclass(frozen=True)
class Conversation:
    """System message (None: the checkpoint's default) and turns, user and assistant in alternation.

    It does not change: each method gives another one, so that a reply that fails leaves the old one as it was. All
    turns are kept, but the first `skipped` are no longer read.
    """

    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    skipped: int = 0

    @property
    def messages(self) -> list[Message]:
        """All that is read for the next reply."""
        first = [] if self.system is None else [Message("system", self.system)]
        return [*first, *self.turns[self.skipped :]]

    @property
    def last_question(self) -> int | None:
        """The place of the user's last message."""
        return next((i for i in reversed(range(len(self.turns))) if self.turns[i].role == "user"), None)

    def ask(self, text: str) -> Conversation:
        return replace(self, turns=[*self.turns, Message("user", text)])

    def answer(self, reply: Message) -> Conversation:
        """With a reply to the last question; one that is there already has gone on, and became this one."""
        answered = bool(self.turns) and self.turns[-1].role == "assistant"
        return replace(self, turns=[*(self.turns[:-1] if answered else self.turns), reply])

    def before(self, turn: int) -> Conversation:
        """As it was before that turn; turns that were skipped may have room again."""
        return replace(self, turns=self.turns[:turn], skipped=self.skipped if turn > self.skipped else 0)

    def fit(self, engine: Engine) -> Conversation:
        """Skip the oldest exchanges until the prompt leaves a quarter of the context for the reply.

        The system message and the newest question always stay: `ContextError` if they alone do not fit.
        """
        room = engine.context
        starts = [i for i in range(self.skipped, len(self.turns)) if self.turns[i].role == "user"] or [self.skipped]

        def needed(start: int) -> int:
            return engine.count(replace(self, skipped=start).messages)

        if needed(self.skipped) <= room - room // 4:  # nearly always, so it is asked first
            return self
        # The later the start, the fewer tokens: the first one that fits is found by halving.
        found = bisect_left(starts, -(room - room // 4), hi=len(starts) - 1, key=lambda start: -needed(start))
        if (least := needed(starts[found])) >= room:
            raise ContextError(
                f"the message has {least} tokens with its surroundings, and the context is {room}",
                "shorten it, or start with a larger --context",
            )
        return replace(self, skipped=starts[found])
