"""A request on its way through the scheduler: its row, and who hears the row's ids and makes text of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from dbrx_cli.engine import Delta, Done, FinishReason, Request
from dbrx_cli.engine.reply import Reply
from model.errors import ContextError, InputError

if TYPE_CHECKING:
    from dbrx_cli.engine.local import LocalEngine
    from dbrx_cli.engine.resume import Journal
    from model.sequence import Drafter


class Job:
    """One request, alone or beside others. `DbrxError` if it cannot be answered. A context manager.

    Give `row` to a scheduler; each step may leave `deltas`. When the row is done, `finish` and `done` close the reply.
    """

    def __init__(self, engine: LocalEngine, request: Request) -> None:
        prompt, begun, before = engine.parts(request)
        if (known := len(prompt) + len(begun)) >= engine.context:
            raise ContextError(
                f"the prompt has {known} tokens{_from_template(engine, request)}, and the context is {engine.context}",
                "shorten the prompt, or raise --context if the model allows",
            )
        self._engine = engine
        self._mask = engine.mask(request)
        self._deltas: list[Delta] = []
        with ExitStack() as opened:
            self._journal = journal = engine.journal(request, prompt)
            if journal is not None:
                opened.enter_context(journal)
            seed = journal.seed if journal else request.params.seed
            self.reply = Reply(engine.tokenizer, request, prompt, seed, begun, before)
            self._set_up(request)
            self._opened = opened.pop_all()

    def _set_up(self, request: Request) -> None:
        import torch

        from model.lookup import lookup

        engine, reply, journal = self._engine, self.reply, self._journal
        if engine.network.expert_store is not None:
            reply.streamed = engine.network.expert_store.counters.copy()
        self._generator = torch.Generator(engine.network.device).manual_seed(reply.seed)
        self._keeps_draws = request.params.seed is not None
        if (drawn := engine.draws_behind(reply)) is not None:  # the reply goes on, and so do the draws
            reply.drawn = drawn
            self._generator.set_state(drawn)
        if journal is not None:
            self._take_up(journal)
            engine.pool.keep(journal.kv, reply.known)
        self._on_read = request.on_read
        reply.drafter = lookup(request.params.lookup)
        self.row = engine.session.sequence(
            reply.prompt,
            replace(request.params, max_tokens=request.params.max_tokens + reply.begun),
            reply=reply.ids,
            eos_ids=engine.tokenizer.eos_token_ids,
            stopper=self._hear,
            mask=self._mask,
            logit_bias=request.logit_bias,
            watcher=reply.watch if reply.top is not None else None,
            drafter=self._drafter(),
            on_read=self._hear_reading,
            # Of its own, so that what the others draw does not change what this one draws.
            generator=self._generator,
            max_context=engine.context,
        )
        self.row.done = self.row.done or (journal is not None and journal.finished is not None)

    def _drafter(self) -> Drafter | None:
        if self._mask is None:
            return self.reply.drafter
        from model.constrain import ForcedDrafter

        return ForcedDrafter(self._mask, len(self.reply.prompt), self.reply.drafter)

    def _take_up(self, journal: Journal) -> None:
        """Go on from what an earlier process left."""
        if journal.finished is not None:
            self._engine.notice(f"{journal.path} holds the whole reply; nothing is computed anew")
        elif journal.kv.length:  # told before the text, which does not end its line
            self._engine.notice(f"{journal.path}: the reply goes on behind {len(journal.ids)} tokens")
        self._deltas += self.reply.repeat(journal.ids, journal.logprobs)
        if journal.generator is not None:
            self._generator.set_state(journal.generator)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the journal, and keep what was counted."""
        self._opened.close()
        self._engine.keep_use()

    def deltas(self) -> Iterator[Delta]:
        """What came since the last call; after an interrupt the next call goes on behind the one it struck at."""
        while self._deltas:
            yield self._deltas.pop(0)

    def finish(self) -> FinishReason:
        """Say why a row is done that has no fault."""
        if self._journal is not None and self._journal.finished is not None:
            return self._journal.finished
        reason: FinishReason = "length"
        if self.reply.stopped:
            reason = "stop_string"
        elif self.reply.ids[-1] in self._engine.tokenizer.eos_token_ids or self._is_complete():
            reason = "stop"
        if self._journal is not None:
            self._journal.finish(reason)
        return reason

    def done(self, reason: FinishReason) -> Done:
        """The closing record; what of the text was held back becomes the last of the deltas."""
        self.reply.cached = self.row.cached_tokens
        if rest := self.reply.finish(reason):
            self._deltas.append(Delta(rest, None))
        fault = self.row.fault if isinstance(self.row.fault, InputError) else None
        return replace(self.reply.done(self._engine, reason), error=fault)

    def _hear(self, _: int, ids: Sequence[int]) -> bool:
        """Take the row's newest id; whether the reply is complete (see `Stopper`)."""
        for token in ids[len(self.reply.ids) :]:
            self._deltas.append(self.reply.add(token))
            if self._keeps_draws:
                self.reply.drawn = self._generator.get_state()
            if self._journal is not None:
                assert self.row.kv is not None
                self._journal.note(self.reply, self.row.kv, self._generator.get_state())
        return self.reply.stopped or self._is_complete()

    def _is_complete(self) -> bool:
        return self._mask is not None and self._mask.complete(0, self.reply.ids)

    def _hear_reading(self) -> None:
        kv = self.row.kv
        assert kv is not None
        total, left = (len(self.reply.known) - length for length in (self.row.cached_tokens, kv.length))
        if self._on_read is not None:
            self._on_read(total - left, total)
        if self._journal is not None and 0 < left < total:
            self._journal.note(self.reply, kv, None)


def _from_template(engine: LocalEngine, request: Request) -> str:
    """Says so where it is the template that makes a prompt too long for the context, not what was asked."""
    if isinstance(request.prompt, str):
        return ""
    own = sum(len(engine.tokenizer.encode(message.content)) for message in request.prompt)
    return f", all but {own} from {engine.tokenizer.chat_template.name}" if own < engine.context // 2 else ""
