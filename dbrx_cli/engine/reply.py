"""A reply as it is made: its ids, its text, its clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from secrets import randbits
from typing import TYPE_CHECKING

from dbrx_cli.engine import Continued, Delta, Done, FinishReason, Likelihood, Request, Timings, TokenLogprob, Usage
from model.detokenizer import Detokenizer
from model.messages import Message

if TYPE_CHECKING:
    from torch import Tensor

    from dbrx_cli.engine.local import LocalEngine
    from model.lookup import Lookup
    from model.streaming import Counters
    from model.tokenizer import Tokenizer


class Reply:
    """The reply to one request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        prompt: list[int],
        seed: int | None,
        begun: Sequence[int] = (),
        before: str = "",
    ) -> None:
        """begun, before: ids, where they are known, and text of the reply that the request continues."""
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.ids = list(begun)
        self.begun = len(begun)
        self.cached = 0  # tokens of the prompt that were not read anew
        self.kept = self.begun  # tokens of the reply that were made before
        self.seed = seed if seed is not None else randbits(32)
        self.top = request.logprobs
        self.logprobs: list[TokenLogprob] = []
        self.drafter: Lookup | None = None
        self.streamed: Counters | None = None  # of the experts when the reply began, if they are streamed
        self.drawn: Tensor | None = None  # the generator's state after the newest token, if a seed was given
        self._detokenizer = Detokenizer(tokenizer, stop=request.stop)
        self._detokenizer.repeat(begun)
        self._before = before
        self._shown = len(before)  # characters
        self.text = before.removesuffix(self._detokenizer.held)  # a stop string that goes across makes it shorter
        self._started = time.perf_counter()
        self._first_token_at: float | None = None
        self._last_token_at: float | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._detokenizer.stopped

    @property
    def stop_string(self) -> str | None:
        """The one that has come."""
        return self._detokenizer.stop_string

    @property
    def known(self) -> list[int]:
        """Prompt and reply so far."""
        return self.prompt + self.ids

    def repeat(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[Delta]:
        """Take up what an earlier process made."""
        self.logprobs = list(logprobs)
        self.kept = len(ids)
        return [self.add(token) for token in ids]

    def add(self, token: int) -> Delta:
        """Take a token; with the text that can be shown now. The token that ends a turn has none."""
        if len(self.ids) >= self.kept:
            self._last_token_at = time.perf_counter()
            self._first_token_at = self._first_token_at or self._last_token_at
        self.ids.append(token)
        piece = "" if token in self.tokenizer.eos_token_ids else self._detokenizer.push(token)
        logprob = self.logprobs[len(self.ids) - 1 - self.begun] if self.top is not None else None
        return Delta(self._show(piece), token, logprob)

    def finish(self, reason: FinishReason) -> str:
        """The text that was held back."""
        return self._show(self._detokenizer.finish(cut=reason in ("length", "interrupted")))

    def _show(self, piece: str) -> str:
        """Take certain text; what of it was not shown before."""
        self.text += piece
        shown, self._shown = self._shown, max(self._shown, len(self.text))
        return self.text[shown:]

    def watch(self, row: int, token: int, logits: Tensor) -> None:
        """Note how likely a token is (see `Watcher`)."""
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(min(self.top or 0, len(logprobs)))
        top = [self._likelihood(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        own = self._likelihood(token, float(logprobs[token]))
        self.logprobs.append(TokenLogprob(own.token_id, own.text, own.logprob, top))

    def _likelihood(self, token: int, logprob: float) -> Likelihood:
        return Likelihood(token, self.tokenizer.decode([token]), logprob)

    def done(self, engine: LocalEngine, reason: FinishReason) -> Done:
        """The closing record."""
        now = time.perf_counter()
        first = self._first_token_at or now
        prefill_s, decode_s = first - self._started, (self._last_token_at or now) - first
        store = engine.network.expert_store
        made, given = len(self.ids) - self.kept, len(self.prompt) + self.begun
        cached = min(self.cached, given)
        done = Done(
            text=self.text[len(self._before) :],
            token_ids=self.ids[self.begun :],
            finish_reason=reason,
            usage=Usage(given, cached, len(self.ids) - self.begun),
            timings=Timings(
                load_s=engine.load_s,
                prefill_s=prefill_s,
                decode_s=decode_s,
                prefill_tokens_per_s=(given - cached) / prefill_s if prefill_s else 0.0,
                decode_tokens_per_s=max(0, made - 1) / decode_s if decode_s else 0.0,
                drafted_tokens=self.drafter.drafted if self.drafter else 0,
                accepted_tokens=self.drafter.accepted if self.drafter else 0,
            ),
            model=engine.name,
            revision=engine.revision,
            attn=engine.network.transformer.attention,
            dtype=str(engine.network.kv_dtype).removeprefix("torch."),
            quantize=engine.quantize,
            seed=self.seed,
            logprobs=self.logprobs[: len(self.ids) - self.begun] if self.top is not None else None,
            card=engine.network.on_card(),
            experts=store.counters.since(self.streamed) if store and self.streamed else None,
        )
        if not self._before:
            return done
        return Continued(**vars(done), whole=Message("assistant", self.text, tuple(self.ids)))
