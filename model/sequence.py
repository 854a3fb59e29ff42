"""A row of a batch: a prompt, the rules for its reply, and the reply so far. Knows ids and logits; no text."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Ids
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import DbrxError, InputError, NotFiniteError
from .kv_cache import KVRow
from .sampling import SamplingParams, draw, penalize, sample


class Stopper(Protocol):
    """Says after each token whether its row is complete."""

    def __call__(self, row: int, ids: Ids[int]) -> bool:
        """ids: all that the row's reply has so far, the newest last."""


class LogitsMask(Protocol):
    """Forbids tokens, for constrained decoding. What also ends a row is a `Stopper` beside it."""

    def __call__(self, row: int, ids: Ids[int], logits: Tensor) -> Tensor:
        """logits [vocab] -> the same with -inf where a token may not come next.

        ids: all that the row's reply has so far. From call to call it only grows, mostly by one, by many where a
        reply is taken up; drafts that were not accepted are never shown.
        """


@runtime_checkable
class LooksAhead(LogitsMask, Protocol):
    """A `LogitsMask` that knows, too, of tokens that it allows but that lead nowhere."""

    def leads_on(self, row: int, ids: Ids[int]) -> bool:
        """Whether the row can go on behind the newest of `ids`; if not, that one is taken back and never told again."""


class Watcher(Protocol):
    """Sees each token with the scores that it was chosen from."""

    def __call__(self, row: int, token: int, logits: Tensor) -> None:
        """logits [vocab] float32: the network's own, before penalties, mask, temperature and cuts."""


class Drafter(Protocol):
    """Guesses the ids that come next, to be verified by the network in one step."""

    def draft(self, ids: Ids[int], most: int) -> list[int]:
        """Up to `most` ids behind `ids`, prompt and reply; none where it knows nothing."""

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """After each step: how many ids were drafted, how many of them right, and what the step took."""


class Sequence:
    """One reply as it is made: the rules for it, and its ids so far. All that a row needs is its own.

    `done` says whether it is complete, `fault` what ended it. A row ends with one of `eos_ids` (which is one of its
    ids), when `stopper` says so, after `max_tokens`, or when prompt and reply have `max_context` tokens.
    """

    def __init__(
        self,
        prompt: Ids[int],
        params: SamplingParams,
        *,
        reply: Ids[int] = (),
        kv: KVRow | None = None,
        logits: Tensor | None = None,
        number: int = 0,
        eos_ids: Ids[int] = (),
        stopper: Stopper | None = None,
        mask: LogitsMask | None = None,
        logit_bias: Mapping[int, float] | None = None,
        watcher: Watcher | None = None,
        drafter: Drafter | None = None,
        on_read: Callable[[], None] | None = None,
        generator: torch.Generator | None = None,
        max_context: int = sys.maxsize,
    ) -> None:
        """reply: what it has said already. kv: keys and values of ids at its front, which are not read again.

        logits [vocab]: what the network gave behind prompt and reply, if kv holds all of these. number: what stopper,
        mask and watcher are told. logit_bias: added to the logits of these ids, behind penalties. on_read: hears when
        there is something to read, and when a chunk of it was read.
        """
        self.prompt = prompt
        self.ids = list(reply)
        self.kv = kv
        self.logits = logits  # then: behind all that was known before its first new token
        self.logits_at = len(prompt) + len(reply)
        self.cached_tokens = 0  # that were found in the pool instead of read, when it was admitted
        self.params = params
        self.max_context = max_context
        self.drafter, self.on_read = drafter, on_read
        self.fault: DbrxError | None = None  # that ended it
        self._number, self._generator = number, generator
        self._stopper, self._mask, self._watcher = stopper, mask, watcher
        self._bias = logit_bias or {}
        self._biases: tuple[Tensor, Tensor] | None = None  # ids and what is added, where logits lie
        self._ends = frozenset(eos_ids)
        self._penalized = params.repetition_penalty != 1 or bool(params.frequency_penalty or params.presence_penalty)
        self._occurred: tuple[Tensor, Tensor] | None = None  # what `penalize` asks for: seen, counts
        self.done = bool(self.ids) and self._complete()

    @property
    def known(self) -> list[int]:
        """Prompt and reply so far."""
        return [*self.prompt, *self.ids]

    @property
    def left(self) -> int:
        """How many ids may still come."""
        return min(self.params.max_tokens, self.max_context - len(self.prompt)) - len(self.ids)

    @property
    def most_tokens(self) -> int:
        """Prompt and reply at their longest."""
        return len(self.prompt) + len(self.ids) + self.left

    @property
    def runs_ahead(self) -> bool:
        """Whether nothing on the host must know its newest id before the next step can begin."""
        return not (self._penalized or self._mask or self._watcher)

    def draft(self, most: int) -> list[int]:
        """Up to `most` ids that may come next."""
        if self.drafter is None:
            return []
        return self.drafter.draft(self.known, min(most, self.left - 1))

    def verify(self, draft: Ids[int], logits: Tensor, begun: float | None = None) -> Iterator[int]:
        """Choose ids while the draft is right; logits [1 + drafted, vocab] behind the newest id and each drafted one.

        A draft is right where it is what is chosen anyway. So the text is that of decoding one by one, and so is each
        draw of the generator. A `DbrxError`, such as of a mask that lets nothing through, is this row's fault.
        begun: when the step that computed the logits began.
        """
        accepted, seconds = 0, 0.0
        try:
            for at, scores in enumerate(logits):
                token = self._choose(scores)
                seconds = seconds or time.perf_counter() - (begun or 0)
                right = at < len(draft) and token == draft[at]
                if right and self.kv is not None:
                    self.kv.length += 1
                accepted += right
                yield token
                if self.done or not right:
                    break
        except DbrxError as fault:
            self.fault, self.done = fault, True
        if self.drafter is not None and begun is not None:
            self.drafter.learn(len(draft), accepted, seconds)

    def choose(self, logits: Tensor) -> Tensor:
        """Of a row that runs ahead, choose the next id where logits [vocab] lie: it, and 0 if they are not finite.

        int64 [2], for `take`; nothing is waited for.
        """
        scores = self._biased(logits.float())
        return torch.stack((draw(scores, self.params, self._generator), scores.max().isfinite()))

    def take(self, token: int, is_finite: int, seconds: float) -> list[int]:
        """What `choose` gave, now that it is known: the new id, or a fault and none. seconds: what the step took."""
        if self.drafter is not None:
            self.drafter.learn(0, 0, seconds)
        if not is_finite:
            self.fault, self.done = _not_finite(), True
            return []
        self._add(token)
        return [token]

    def _choose(self, logits: Tensor) -> int:
        raw = logits.float()
        scores = self._biased(self._penalize(raw) if self._penalized else raw)
        if self._mask is not None:
            scores = self._mask(self._number, self.ids, scores)
        token = self._pick(scores)
        if self._watcher is not None:
            self._watcher(self._number, token, raw)
        self._add(token)
        return token

    def _biased(self, scores: Tensor) -> Tensor:
        if not self._bias:
            return scores
        if self._biases is None:
            ids = torch.tensor([*self._bias], device=scores.device)
            self._biases = ids, scores.new_tensor([*self._bias.values()])
        return scores.index_add(0, *self._biases)

    def _add(self, token: int) -> None:
        self.ids.append(token)
        self.done = self._complete()

    def _pick(self, scores: Tensor) -> int:
        """A token, one behind which the reply can go on."""
        token = sample(finite(scores), self.params, self._generator)
        if isinstance(self._mask, LooksAhead):
            while not self._mask.leads_on(self._number, [*self.ids, token]):
                scores = scores.index_fill(0, torch.tensor([token], device=scores.device), float("-inf"))
                if not scores.max().isfinite():
                    raise InputError("nothing that is allowed next leads on: the reply cannot be completed")
                token = sample(scores, self.params, self._generator)
        return token

    def _penalize(self, logits: Tensor) -> Tensor:
        if self._occurred is None:
            said = torch.tensor(self.ids, dtype=torch.long, device=logits.device)
            counts = said.bincount(minlength=len(logits)).float()
            seen = counts > 0
            seen[torch.tensor(self.prompt, dtype=torch.long, device=logits.device)] = True
            self._occurred = seen, counts
        elif self.ids:
            seen, counts = self._occurred
            seen[self.ids[-1]] = True
            counts[self.ids[-1]] += 1
        return penalize(logits, *self._occurred, self.params)

    def _complete(self) -> bool:
        # The stopper last but always: it hears of every token.
        ended = self.ids[-1] in self._ends or self.left <= 0
        return (self._stopper is not None and self._stopper(self._number, self.ids)) or ended


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids at the front are the same."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # the first `low` are the same; slices are compared much faster than one id after the other
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def finite(logits: Tensor) -> Tensor:
    """Logits as they are; `NotFiniteError` for numbers that no sound network makes. -inf is a mask's."""
    # NaN is the largest. NumPy wakes no threads; from a card one number comes faster than all.
    if not math.isfinite(logits.max() if logits.is_cuda else logits.numpy(force=True).max()):
        raise _not_finite()
    return logits


def _not_finite() -> NotFiniteError:
    return NotFiniteError(
        "the model computed numbers that are not finite: its weights are damaged, or overflow in this dtype",
        "check the files with `dbrx download MODEL --verify`, or try --dtype float32",
    )
