"""Buffers on the way to a card, with a card that copies as late as it may: when an event is waited for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Semaphore

import pytest
import torch
from torch import Tensor

from model import DbrxForCausalLM
from model.staging import Event, Staging, staged
from model.streaming.slots import CpuSlot
from model.streaming.source import slot_size
from model.weights import Extent
from tests.test_hybrid import greedy, machine_with

CPU = torch.device("cpu")
NBYTES, EXPERTS = 4096, 9


class LateCard:
    """Does what was begun, in order, when somebody waits for it; and tells what happened."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, Tensor, Tensor]] = []
        self.done = 0
        self.told: list[str] = []
        self._lock = Lock()

    def copy(self, i: int, source: Tensor) -> Tensor:
        self.begun.append((i, source, torch.empty_like(source)))
        return self.begun[-1][2]

    def record(self, device: torch.device) -> Event:
        return Behind(self, len(self.begun))

    def run(self, count: int) -> None:
        with self._lock:
            for i, source, to in self.begun[self.done : count]:
                to.copy_(source)
                self.told.append(f"copied {i}")
            self.done = max(self.done, count)


class Behind:
    """An event behind so many copies."""

    def __init__(self, card: LateCard, count: int) -> None:
        self.card, self.count = card, count

    def synchronize(self) -> None:
        self.card.run(self.count)


def numbers(i: int) -> Tensor:
    return torch.full((NBYTES,), i, dtype=torch.uint8)


def test_a_buffer_is_filled_again_when_it_was_copied() -> None:
    """One is read while the one before is on its way; of the bytes that arrive none is another's."""
    card, arrived = LateCard(), []
    staging = Staging([CpuSlot(NBYTES) for _ in range(2)], card.record)
    for i in range(4):
        with staging.buffer(CPU) as buffer:
            card.told.append(f"read {i}")
            buffer.tensor.copy_(numbers(i))
            arrived.append(card.copy(i, buffer.tensor))
    staging.close()
    assert card.told == ["read 0", "read 1", "copied 0", "read 2", "copied 1", "read 3", "copied 2", "copied 3"]
    assert all(torch.equal(each, numbers(i)) for i, each in enumerate(arrived))


def test_no_more_are_on_their_way_than_there_are_buffers() -> None:
    """Whatever the number of threads; and a fault gives its buffer back."""
    card, inside, few = LateCard(), Semaphore(2), list[bool]()
    staging = Staging([CpuSlot(NBYTES) for _ in range(2)], card.record)

    def bring(i: int) -> Tensor:
        with staging.buffer(CPU) as buffer:
            few.append(inside.acquire(blocking=False))
            buffer.tensor.copy_(numbers(i))
            inside.release()
            if i % 4 == 3:
                raise OSError("gone")
            return card.copy(i, buffer.tensor)

    with ThreadPoolExecutor(6) as pool:
        coming = [pool.submit(bring, i) for i in range(EXPERTS)]
    staging.close()
    assert [i for i, each in enumerate(coming) if each.exception()] == [3, 7] and all(few)
    assert all(torch.equal(each.result(), numbers(i)) for i, each in enumerate(coming) if i % 4 != 3)


def test_beside_a_cpu_there_are_none() -> None:
    with staged(2, [], CPU) as staging:
        assert staging is None


def test_a_network_is_loaded_through_them(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of floats that become int8, and are not what a buffer held."""
    used: list[int] = []

    @contextmanager
    def here(count: int, experts: Iterable[Sequence[Extent]], device: torch.device) -> Iterator[Staging]:
        def record(of: torch.device) -> Event:
            used.append(1)
            return LateCard().record(of)

        nbytes = slot_size(experts)
        yield Staging([CpuSlot(nbytes) for _ in range(count)], record)

    def load() -> list[int]:
        monkeypatch.setattr("model.loading.free_memory", lambda gpus: machine_with(2**40))
        return greedy(DbrxForCausalLM.from_pretrained(small_checkpoint, device_map="auto", quantize="int8"), 8)

    alone = load()
    monkeypatch.setattr("model.packing.staged", here)
    assert load() == alone and len(used) == 3 * 16
