"""Many requests at once: as rows on the model in this process; at_once.py asks a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from dbrx_cli.engine import Done, Engine, Request
from dbrx_cli.engine.damage import damage_named
from dbrx_cli.engine.job import Job
from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.engine.memory import memory_fault
from model.errors import DbrxError, ModelError

if TYPE_CHECKING:
    from model.sequence import Sequence

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
    from model.scheduler import Scheduler

    scheduler, line = Scheduler(engine.network, rows, engine.pool), iter(requests)
    engine.pool.budget_bytes = engine.kv_budget(rows)
    jobs: dict[Sequence, tuple[int, Job]] = {}
    try:
        while True:
            while len(jobs) < rows and (numbered := next(line, None)):
                number, request = numbered
                try:
                    job = Job(engine, request)
                except DbrxError as fault:
                    yield number, fault
                    continue
                jobs[job.row] = number, job
                scheduler.add(job.row)
            if not jobs:
                return
            try:
                scheduler.step()
            except (MemoryError, RuntimeError) as error:
                raise memory_fault(error, engine.network, scheduler.cache) or error from None
            for row in [row for row in jobs if row.done]:
                number, job = jobs.pop(row)
                with job:
                    if isinstance(row.fault, ModelError):
                        with damage_named(engine.source):
                            raise row.fault
                    yield number, row.fault or job.done(job.finish())
    finally:
        for row, (_, job) in jobs.items():
            scheduler.cancel(row)
            job.close()
