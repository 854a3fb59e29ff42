"""Way 4: read the prompt, then one token after the other. Knows the network, the cache and the sampler; no text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import InputError, NotFiniteError
from .kv_cache import KVCache
from .sampling import SamplingParams, penalize, sample

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

PREFILL_CHUNK = 512  # tokens a step: large enough for full matrix speed, small enough for Ctrl-C and memory


class Stopper(Protocol):
    """Says after each token whether its row is complete."""

    def __call__(self, row: int, ids: Sequence[int]) -> bool:
        """ids: all that the row's reply has so far, the newest last."""


class LogitsMask(Protocol):
    """Forbids tokens, for constrained decoding. What also ends a row is a `Stopper` beside it."""

    def __call__(self, row: int, ids: Sequence[int], logits: Tensor) -> Tensor:
        """logits [vocab] -> the same with -inf where a token may not come next.

        ids: all that the row's reply has so far. From call to call it only grows, mostly by one, by many where a
        reply is taken up; drafts that were not accepted are never shown.
        """


@runtime_checkable
class LooksAhead(LogitsMask, Protocol):
    """A `LogitsMask` that knows, too, of tokens that it allows but that lead nowhere."""

    def leads_on(self, row: int, ids: Sequence[int]) -> bool:
        """Whether the row can go on behind the newest of `ids`; if not, that one is taken back and never told again."""


class Watcher(Protocol):
    """Sees each token with the scores that it was chosen from."""

    def __call__(self, row: int, token: int, logits: Tensor) -> None:
        """logits [vocab] float32: the network's own, before penalties, mask, temperature and cuts."""


class Drafter(Protocol):
    """Guesses the ids that come next, to be verified by the network in one step."""

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` ids behind `ids`, prompt and reply; none where it knows nothing."""

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """After each step: how many ids were drafted, how many of them right, and what the step took."""


@torch.inference_mode()
def prefill(
    network: DbrxForCausalLM,
    input_ids: Tensor,
    cache: KVCache,
    attention_mask: Tensor | None = None,
    on_chunk: Callable[[int], None] | None = None,
    chunk: int | None = None,
    whole: bool = False,
) -> Tensor:
    """Read input_ids [rows, seq] (padded on the left) into the cache; logits [rows, vocab] after the last column.

    What only the logits of the other columns would need is not computed, unless `whole` asks for it (to be watched).
    `on_chunk` hears how many columns were read. An interruption keeps the chunks that were finished.
    """
    columns = input_ids.shape[1]
    if columns == 0:
        raise ValueError("there is nothing to read: the prompt has no token")
    chunk = chunk or network.prefill_chunk or PREFILL_CHUNK
    for start in range(0, columns, chunk):
        part = slice(start, min(start + chunk, columns))
        mask = None if attention_mask is None else attention_mask[:, part]
        out = network.transformer(input_ids[:, part], mask, past_key_values=cache, last_only=not whole)
        if on_chunk:
            on_chunk(part.stop - start)
    # Only the last position's logits are read: [seq, 100352] floats would fill the memory.
    logits: Tensor = network.lm_head(out.last_hidden_state[:, -1])
    return logits


@torch.inference_mode()
def decode(
    network: DbrxForCausalLM,
    prompts: Sequence[Sequence[int]],
    logits: Tensor,
    cache: KVCache,
    params: SamplingParams,
    *,
    replies: Sequence[Sequence[int]] | None = None,
    eos_ids: Sequence[int] = (),
    stopper: Stopper | None = None,
    mask: LogitsMask | None = None,
    watcher: Watcher | None = None,
    drafter: Drafter | None = None,
    generator: torch.Generator | None = None,
    max_context: int | None = None,
) -> Generator[list[int | None], None, None]:
    """Yield the next id of each row, None for a row that is complete, until all are.

    prompts: the ids that were read, for the penalties; logits [rows, vocab] as `prefill` gave them. A row ends with
    one of `eos_ids` (which is yielded), when `stopper` says so, after `max_tokens`, or at `max_context` tokens.
    `replies`: what the rows have said already and the cache holds, where a reply is taken up.
    A token is read into the cache only when the one after it is asked for. With a `drafter` (for one row) the cache
    may run ahead of what was yielded: cut it to the ids that are known before it is used again.
    """
    if drafter is not None and len(prompts) != 1:
        raise ValueError("a drafter is for one row")
    said = replies or [()] * len(prompts)
    rows = [
        Row(
            network,
            prompt,
            params,
            reply=reply,
            number=i,
            eos_ids=eos_ids,
            stopper=stopper,
            mask=mask,
            watcher=watcher,
            generator=generator,
            max_context=max_context,
        )
        for i, (prompt, reply) in enumerate(zip(prompts, said, strict=True))
    ]
    draft: list[int] = []
    columns: Tensor | None = logits[:, None]  # [rows, 1 + drafted, vocab]: after the newest id, after each drafted one
    begun: float | None = None
    while not all(row.done for row in rows):
        if columns is None:
            if drafter is not None:
                draft = drafter.draft([*prompts[0], *rows[0].ids], rows[0].left - 1)
            # A row that is complete is fed its last token again: nothing of it is read any more.
            column = torch.tensor([[row.ids[-1], *draft] for row in rows], device=logits.device)
            begun = time.perf_counter()
            columns = network(column, past_key_values=cache).logits
        accepted, seconds = 0, 0.0
        try:
            for at in range(columns.shape[1]):
                # A draft is right where it is what is chosen anyway. So the text is that of decoding one by one, and
                # so is each draw of the generator.
                new = [None if row.done else row.choose(columns[i, at]) for i, row in enumerate(rows)]
                seconds = seconds or time.perf_counter() - (begun or 0)
                right = at < len(draft) and new[0] == draft[at]
                accepted += right
                if draft and not right:
                    cache.trim(0, len(cache) - len(draft) + at)
                yield new
                if not right or rows[0].done:
                    break
        finally:
            if drafter is not None and begun is not None:
                drafter.learn(len(draft), accepted, seconds)
        columns = None


class Row:
    """One reply as it is made: the rules for it, and its ids so far. `done` says whether it is complete."""

    def __init__(
        self,
        network: DbrxForCausalLM,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        reply: Sequence[int] = (),
        number: int = 0,
        eos_ids: Sequence[int] = (),
        stopper: Stopper | None = None,
        mask: LogitsMask | None = None,
        watcher: Watcher | None = None,
        generator: torch.Generator | None = None,
        max_context: int | None = None,
    ) -> None:
        """reply: what it has said already; number: what stopper, mask and watcher are told; else see `decode`."""
        self.prompt = prompt
        self.ids = list(reply)
        self.cached = 0  # tokens of the prompt that were taken over instead of read
        self.params = params
        self._number, self._generator = number, generator
        self._stopper, self._mask, self._watcher = stopper, mask, watcher
        self._ends = frozenset(eos_ids)
        room = (max_context or network.config.max_seq_len) - len(prompt)
        self._most = min(params.max_tokens, room)
        self._penalized = params.repetition_penalty != 1 or bool(params.frequency_penalty or params.presence_penalty)
        self._occurred: tuple[Tensor, Tensor] | None = None  # what `penalize` asks for: seen, counts
        self.fault: InputError | None = None  # that ended it
        self.done = bool(self.ids) and self._complete()

    @property
    def left(self) -> int:
        """How many ids may still come."""
        return self._most - len(self.ids)

    def choose(self, logits: Tensor) -> int:
        """The next id, from the network's logits [vocab]."""
        raw = logits.float()
        scores = self._penalize(raw) if self._penalized else raw
        if self._mask is not None:
            scores = self._mask(self._number, self.ids, scores)
        token = self._pick(scores)
        self.ids.append(token)
        if self._watcher is not None:
            self._watcher(self._number, token, raw)
        self.done = self._complete()
        return token

    def _pick(self, scores: Tensor) -> int:
        """A token, one behind which the reply can go on."""
        token = sample(_finite(scores), self.params, self._generator)
        if isinstance(self._mask, LooksAhead):
            while not self._mask.leads_on(self._number, [*self.ids, token]):
                scores = scores.index_fill(0, torch.tensor([token], device=scores.device), float("-inf"))
                if not scores.max().isfinite():
                    raise InputError("nothing that is allowed next leads on: the reply cannot be completed")
                token = sample(scores, self.params, self._generator)
        return token

    def try_choose(self, logits: Tensor) -> int | None:
        """As `choose`; an `InputError`, such as of a mask that lets nothing through, ends this row and is its fault."""
        try:
            return self.choose(logits)
        except InputError as fault:
            self.fault, self.done = fault, True
            return None

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


def _finite(logits: Tensor) -> Tensor:
    """Refuse numbers that no sound network makes; -inf is a mask's."""
    if not math.isfinite(float(logits.max())):  # NaN is the largest
        raise NotFiniteError(
            "the model computed numbers that are not finite: its weights are damaged, or overflow in this dtype",
            "check the files with `dbrx download MODEL --verify`, or try --dtype float32",
        )
    return logits
