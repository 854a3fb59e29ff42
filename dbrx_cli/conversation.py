"""The turns of a chat as they grow, and what gives way when the context is full."""

from __future__ import annotations

from dataclasses import dataclass, field

from dbrx_cli.engine import Engine
from model.errors import ContextError
from model.messages import Message


@dataclass
class Conversation:
    """System message (None: the checkpoint's default) and turns, user and assistant in alternation."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All that is read for the next reply."""
        first = [] if self.system is None else [Message("system", self.system)]
        return [*first, *self.turns]

    def ask(self, text: str) -> None:
        self.turns.append(Message("user", text))

    def answer(self, text: str) -> None:
        self.turns.append(Message("assistant", text))

    def take_back(self) -> None:
        """Forget the last question, which got no answer."""
        if self.turns and self.turns[-1].role == "user":
            self.turns.pop()

    def clear(self) -> None:
        self.turns.clear()

    def fit(self, engine: Engine) -> list[Message]:
        """Drop the oldest exchanges until the prompt leaves a quarter of the context for the reply; return them.

        The system message and the newest question always stay: `ContextError` if they alone do not fit.
        """
        dropped: list[Message] = []
        room = engine.context
        while (needed := engine.count(self.messages)) > room - room // 4 and len(self.turns) > 1:
            count = 2 if len(self.turns) > 2 else 1
            dropped += self.turns[:count]
            del self.turns[:count]
        if needed >= room:
            self.turns[:0] = dropped
            raise ContextError(
                f"the message has {needed} tokens with its surroundings, and the context is {room}",
                "shorten it, or start with a larger --context",
            )
        return dropped
