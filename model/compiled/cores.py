"""Jobs side by side, each on a core of its own: none waits for another at the end of each loop and product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

LEAST = 4  # jobs for each core: of fewer, cores would wait for the one that has the last
T = TypeVar("T")


def side_by_side(job: Callable[[T], object], things: Sequence[T]) -> None:
    """Do a job for each thing: on a core each, or, where these are too many, one after the other on all of them."""
    cores = torch.get_num_threads()
    if cores == 1 or len(things) < LEAST * cores:
        for thing in things:
            job(thing)
    else:
        for _ in _pool(cores).map(job, things):
            pass  # raised here, if it was there


@cache
def _pool(cores: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(cores, "core", _one_core)
    all_started = Barrier(cores)
    for _ in pool.map(lambda _: all_started.wait(), range(cores)):
        pass
    torch.set_num_threads(cores)  # what a thread sets reaches MKL in all of them
    return pool


def _one_core() -> None:
    """What this thread computes, it computes alone."""
    torch.get_num_threads()  # a thread takes, when it first needs it, the number that was set last in any
    torch.set_num_threads(1)
