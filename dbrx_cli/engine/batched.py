"""Many requests at once: as rows on the model in this process; at_once.py asks a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dbrx_cli.engine import Done, Engine, FinishReason, Request
from dbrx_cli.engine.damage import damage_named
from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.engine.memory import memory_fault
from dbrx_cli.engine.reply import Reply
from model.errors import ContextError, DbrxError

if TYPE_CHECKING:
    from model.decode import Row

Answer = tuple[int, Done | DbrxError]


def answers(engine: Engine, requests: Iterable[tuple[int, Request]], rows: int) -> Iterator[Answer]:
    """Answer numbered requests, `rows` at a time, and give each answer when it is complete, or its request's fault.

    A request is taken when there is room for it. Faults of the model, the machine or the server are raised.
    """
    if isinstance(engine, LocalEngine):
        return _together(engine, requests, rows)
    from dbrx_cli.engine.at_once import at_once
    from dbrx_cli.engine.remote import RemoteEngine

    assert isinstance(engine, RemoteEngine)
    return at_once(engine, requests, rows)


def _together(engine: LocalEngine, requests: Iterable[tuple[int, Request]], rows: int) -> Iterator[Answer]:
    from model.batch import Batch

    batch, line = Batch(engine.network, rows), iter(requests)
    jobs: dict[Row, _Job] = {}
    while True:
        while len(batch) < rows and (numbered := next(line, None)):
            number, request = numbered
            try:
                job = _Job(engine, number, request)
            except DbrxError as fault:
                yield number, fault
                continue
            jobs[job.row] = job
            batch.add(job.row)
        if not len(batch):
            return
        try:
            with damage_named(engine.source):
                new = batch.step()
        except (MemoryError, RuntimeError) as error:
            raise memory_fault(error, engine.network, batch.cache) or error from None
        for row, _ in new:
            if row.done:
                job = jobs.pop(row)
                yield job.number, row.fault or job.done()


class _Job:
    """A request on its way through the batch. `DbrxError` if it cannot be answered."""

    def __init__(self, engine: LocalEngine, number: int, request: Request) -> None:
        import torch

        from model.decode import Row

        ids = engine._encode(request.prompt, request.continue_final)
        if len(ids) >= engine.context:
            raise ContextError(f"the prompt has {len(ids)} tokens, and the context is {engine.context}", "shorten it")
        self.number = number
        self._engine = engine
        self._reply = Reply(engine.tokenizer, request, ids, request.params.seed)
        self._mask = engine._mask(request)
        self.row = Row(
            engine.network,
            ids,
            request.params,
            eos_ids=engine.tokenizer.eos_token_ids,
            stopper=self._stop,
            mask=self._mask,
            watcher=self._reply.watch if request.logprobs is not None else None,
            # Of its own, so that what the others draw does not change what this one draws.
            generator=torch.Generator(engine.network.device).manual_seed(self._reply.seed),
            max_context=engine.context,
        )

    def _stop(self, row: int, ids: Sequence[int]) -> bool:
        """Hears every token of the row (see `Stopper`)."""
        self._reply.add(ids[-1])
        return self._reply.stopped or self._complete

    @property
    def _complete(self) -> bool:
        return self._mask is not None and self._mask.complete(0, self._reply.ids)

    def done(self) -> Done:
        """The closing record of a row that is complete."""
        reason: FinishReason = "length"
        if self._reply.stopped:
            reason = "stop_string"
        elif self._reply.ids[-1] in self._engine.tokenizer.eos_token_ids or self._complete:
            reason = "stop"
        self._reply.cached = self.row.cached
        self._reply.finish(reason)
        return self._reply.done(self._engine, reason)
