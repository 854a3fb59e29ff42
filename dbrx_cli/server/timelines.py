"""Conversations as ids: what was read and sampled, found again when the same text comes back.

A client sends text. What the model sampled may be other ids than the tokenizer makes of that text, and then neither
the keys and values behind them nor the reply would be those of a conversation that never left.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from model.chat_template import Segment
from model.messages import Message
from model.tokenizer import Tokenizer

MOST_TOKENS = 2**22  # 16 MiB


class Timeline(NamedTuple):
    """Ids of a conversation up to its last reply, without what closes its turn."""

    ids: array[int]
    prompt: int  # how many of them come before the reply


class Timelines:
    """The newest conversations, each up to its last reply. May be used by several threads."""

    def __init__(self, tokenizer: Tokenizer, most_tokens: int = MOST_TOKENS) -> None:
        self._tokenizer, self._most = tokenizer, most_tokens
        self._kept: OrderedDict[bytes, Timeline] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def keep(self, messages: Sequence[Message], prompt: Sequence[int], reply: Sequence[int]) -> None:
        """Remember the ids of a conversation that ends with a reply."""
        *_, name = _names(messages)
        with self._lock:
            if (before := self._kept.pop(name, None)) is not None:
                self._size -= len(before.ids)
            self._kept[name] = Timeline(array("i", [*prompt, *reply]), len(prompt))
            self._size += len(prompt) + len(reply)
            while self._size > self._most:
                self._size -= len(self._kept.popitem(last=False)[1].ids)

    def encode(self, messages: Sequence[Message]) -> list[int] | None:
        """The ids of a prompt, as far as it goes on from what is remembered; None where it does not."""
        count, found = self._find(messages)
        if found is None:
            return None
        template = self._tokenizer.chat_template
        begun = template.render(messages[: count - 1]) + messages[count - 1].content
        rest = _behind(begun, template.segments(messages))
        return None if rest is None else [*found.ids, *self._tokenizer.encode_segments(rest)]

    def reply(self, messages: Sequence[Message]) -> tuple[list[int], list[int]] | None:
        """Of a conversation that ends with a remembered reply, the ids of the prompt and of the reply."""
        count, found = self._find(messages)
        if found is None or count < len(messages):
            return None
        return [*found.ids[: found.prompt]], [*found.ids[found.prompt :]]

    def foresee(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a remembered conversation, and those behind its reply whatever the user says next."""
        from model.sequence import common_prefix

        one, other = (self.encode([*messages, Message("user", said)]) or [] for said in ("a", "b"))
        return one[: common_prefix(one, other)]

    def _find(self, messages: Sequence[Message]) -> tuple[int, Timeline | None]:
        names = list(_names(messages))
        with self._lock:
            for count in range(len(names), 0, -1):
                if (found := self._kept.get(names[count - 1])) is not None:
                    self._kept.move_to_end(names[count - 1])
                    return count, found
        return 0, None


def _names(messages: Sequence[Message]) -> Iterator[bytes]:
    """Of the conversation up to each message."""
    name = b""
    for message in messages:
        text = f"{message.role} {len(message.content)} {message.content}"
        name = hashlib.sha256(name + text.encode()).digest()
        yield name


def _behind(begun: str, segments: Sequence[Segment]) -> list[Segment] | None:
    """The segments behind a text that they begin with; None if they do not, or if it ends inside a special token."""
    if not "".join(segment.text for segment in segments).startswith(begun):
        return None
    left, rest = len(begun), list(segments)
    while left and left >= len(rest[0].text):
        left -= len(rest.pop(0).text)
    if not left:
        return rest
    if rest[0].special:
        return None
    return [Segment(rest[0].text[left:], False), *rest[1:]]
