"""Ids of a scheduler that holds one row, for tests of what a row does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from model import DbrxForCausalLM, SamplingParams
from model.scheduler import Scheduler
from model.sequence import Sequence as Row


def one_by_one(network: DbrxForCausalLM, row: Row) -> Iterator[int]:
    """The row's ids as they come; raises its fault."""
    scheduler = Scheduler(network, 1)
    scheduler.add(row)
    while len(scheduler):
        yield from (token for _, token in scheduler.step())
    if row.fault is not None:
        raise row.fault


def reply(network: DbrxForCausalLM, prompt: Sequence[int], params: SamplingParams, **options: Any) -> list[int]:
    """The ids that follow a prompt."""
    return list(one_by_one(network, Row(prompt, params, **options)))
