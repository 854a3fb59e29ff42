"""Prompt-lookup speculation: what followed the last time that these ids stood in the text may follow again.

Needs no torch. The drafts cost nothing; what they cost is the step that verifies them, which is wider by as many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

LONGEST, SHORTEST = 4, 2  # ids that must have occurred before; longer matches are tried first


class Lookup:
    """Drafts up to `most` ids at every step where the newest ids have occurred before."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.drafted = 0
        self.accepted = 0
        self._next: dict[tuple[int, ...], int] = {}  # an n-gram -> where the text went on after its last occurrence
        self._indexed = SHORTEST

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """See `Drafter`. From call to call the ids only grow."""
        for end in range(self._indexed, len(ids)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._next[tuple(ids[end - n : end])] = end
        self._indexed = max(self._indexed, len(ids))
        most = min(most, self.most)
        for n in range(min(LONGEST, len(ids)), SHORTEST - 1, -1):
            at = self._next.get(tuple(ids[-n:]))
            if at is not None and most > 0:
                return _continued(ids, at, most)
        return []

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """See `Drafter`."""
        self.drafted += drafted
        self.accepted += accepted


def _continued(ids: Sequence[int], at: int, count: int) -> list[int]:
    """`count` ids from `at` on; behind the end of the text they repeat, as a loop would."""
    draft = list(ids[at : at + count])
    period = len(ids) - at
    while len(draft) < count:
        draft.append(draft[-period])
    return draft


class AutoLookup(Lookup):
    """The same while it pays: while steps with drafts give more ids a second than steps without.

    Both are measured as they come. After a loss it decodes one by one for a while, for twice as long each time.
    """

    MOST = 10  # a verifying step costs little more for ten rows than for three
    MEMORY = 0.8  # what a step's measurement counts for at the next one
    PAUSES = (4, 256)  # steps without drafts, after the first loss and at most

    def __init__(self) -> None:
        super().__init__(self.MOST)
        self._plain_seconds: float | None = None  # of a step without drafts
        self._ids = self._seconds = 0.0  # what steps with drafts gave and took
        self._pause = 0
        self._next_pause = self.PAUSES[0]

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """See `Drafter`."""
        if self._plain_seconds is None or self._pause > 0:
            self._pause = max(0, self._pause - 1)
            return []
        return super().draft(ids, most)

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """See `Drafter`."""
        super().learn(drafted, accepted, seconds)
        if not drafted:
            before = seconds if self._plain_seconds is None else self._plain_seconds
            self._plain_seconds = self.MEMORY * before + (1 - self.MEMORY) * seconds
            return
        assert self._plain_seconds is not None
        self._ids = self.MEMORY * self._ids + accepted + 1
        self._seconds = self.MEMORY * self._seconds + seconds
        if self._ids * self._plain_seconds > self._seconds:
            self._next_pause = self.PAUSES[0]
        else:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, self.PAUSES[1])
            self._ids = self._seconds = 0.0


def lookup(wanted: int | Literal["auto"]) -> Lookup | None:
    """The drafter that `SamplingParams.lookup` names; None for 0."""
    if wanted == "auto":
        return AutoLookup()
    return Lookup(wanted) if wanted else None
