"""Way 6: ids -> text as it streams, with UTF-8 tails and stop strings held back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What a detokenizer needs of a tokenizer."""

    def decode_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes: ...


class Detokenizer:
    """Turns ids into text that is safe to show, one id at a time.

    What `push` and `finish` return, joined, is `tokenizer.decode(ids, skip_special_tokens)` up to the first stop
    string. Where stop strings overlap, the one that begins earliest in the text wins, however the ids cut the text.
    """

    def __init__(self, tokenizer: TokenBytes, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop string must not be empty")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._skip_special_tokens = skip_special_tokens
        # The incremental decoder holds back an unfinished character and replaces what can no longer become one.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # what may begin a stop string
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string appeared; all that follows it is dropped."""
        return self.stop_string is not None

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that became certain, maybe none."""
        piece = self._tokenizer.decode_bytes(token_id, self._skip_special_tokens)
        return self._release(self._decoder.decode(piece))

    def repeat(self, ids: Iterable[int]) -> str:
        """Take ids whose text was shown already, whatever it holds; returns it without a character that lacks bytes."""
        text = self._decoder.decode(b"".join(self._tokenizer.decode_bytes(i, self._skip_special_tokens) for i in ids))
        self.held = text[self._possible_beginning(text) :]
        return text

    def finish(self, *, cut: bool = False) -> str:
        """The end of the ids: returns what was held back.

        cut: others would have come. Then a character that lacks bytes is left out, since nobody said U+FFFD.
        """
        text = self._release("" if cut else self._decoder.decode(b"", final=True), final=True)
        self._decoder.reset()
        return text

    def _release(self, text: str, final: bool = False) -> str:
        if self.stopped:
            return ""
        held = self.held + text
        found = [(at, stop) for stop in self._stop if (at := held.find(stop)) >= 0]
        first, stop = min(found, key=lambda pair: pair[0], default=(len(held), ""))
        # A stop string that begins earlier may still be unfinished: then nothing is decided yet.
        safe = first if final else min(first, self._possible_beginning(held))
        if stop and safe == first:
            self.stop_string, self.held = stop, ""
        else:
            self.held = held[safe:]
        return held[:safe]

    def _possible_beginning(self, held: str) -> int:
        for start in range(max(0, len(held) - self._longest + 1), len(held)):
            tail = held[start:]
            if any(stop.startswith(tail) and stop != tail for stop in self._stop):
                return start
        return len(held)
