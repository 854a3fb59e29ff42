"""The pool of blocks: what it finds, gives way and counts, against plain lists of the texts that it was given."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from dataclasses import replace
from itertools import count
from types import FrameType

import pytest
import torch

from model import DbrxForCausalLM, SamplingParams, kv_pool
from model import scheduler as scheduling
from model.errors import ResourceError
from model.kv_cache import KVBlock, KVRow
from model.kv_pool import KVPool, OneRow, kv_bytes
from model.scheduler import Scheduler
from model.sequence import Sequence as Row
from model.sequence import common_prefix
from tests import fidelity
from tests.test_batch_decoding import alone

torch.set_num_threads(1)

B = 4  # tokens a block
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def network() -> DbrxForCausalLM:
    """The smallest: what is in the blocks is not the question."""
    return fidelity.load("one_kv_head", "sdpa").network


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[KVBlock]:
    """All blocks that exist since."""
    made: weakref.WeakSet[KVBlock] = weakref.WeakSet()

    class Counted(KVBlock):
        def __init__(self, n_layers: int) -> None:
            super().__init__(n_layers)
            made.add(self)

    monkeypatch.setattr("model.kv_cache.KVBlock", Counted)
    return made


def budget(network: DbrxForCausalLM, blocks: int) -> int:
    return kv_bytes(network, blocks * B, B)


def read(network: DbrxForCausalLM, pool: KVPool, text: list[int], tokens: int = 1) -> Row:
    """Have one row read a text."""
    row = Row(text, SamplingParams(temperature=0, max_tokens=tokens))
    scheduler = Scheduler(network, 1, pool)
    scheduler.add(row)
    while len(scheduler):
        scheduler.step()
    return row


def written(row: KVRow, ids: list[int]) -> None:
    """As if a network had read ids: its keys are the ids."""
    keys = torch.tensor(ids, dtype=torch.float32)[row.length :, None, None]
    for layer in range(row.n_layers):
        row.write(layer, row.length, keys, -keys)
    row.length = len(ids)


def test_the_longest_front_of_any_text_is_found(network: DbrxForCausalLM) -> None:
    """Random texts that begin alike in all places, in a block and at its borders."""
    rng, pool, texts = random.Random(1), KVPool(network, None, B), [list[int]()]
    for _ in range(300):
        start = rng.choice(texts)
        text = start[: rng.randrange(len(start) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(1, 14))]
        expected = max(common_prefix(text, other) for other in texts)
        length, found = pool.find(text)
        assert length == expected
        row = KVRow(network.config.n_layers, B)
        row.take(found, length)
        assert length == 0 or row.read(1, 0, length)[0].flatten().tolist() == text[:length]
        written(row, text)
        pool.keep(row, text)
        texts.append(text)
    held = {tuple(text[:end]) for text in texts for end in range(B, len(text) + 1, B)}
    assert sum(len(kept.ids) == B for kept in pool._kept.values()) == len(held)  # a block for each front, once


class Interrupt:
    """Ctrl-C before the line of that number, of those in some files that run inside `with`."""

    def __init__(self, line: int, *files: str) -> None:
        self.left = line
        self._files = files

    def __enter__(self) -> None:
        if self.left > 0:
            sys.settrace(self._trace)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def _trace(self, frame: FrameType, event: str, _: object) -> object:
        self.left -= event == "line" and frame.f_code.co_filename in self._files
        if self.left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self._trace


@pytest.mark.slow
def test_an_interrupt_between_any_two_lines_leaves_a_sound_pool(network: DbrxForCausalLM) -> None:
    """Texts that part inside a block, and a budget in which blocks give way."""
    texts, layers = [[1] * 10, [1] * 6 + [2] * 7, [1] * 5, [3] * 14], network.config.n_layers
    for line in count(1):
        pool, interrupt = KVPool(network, budget(network, 6), B), Interrupt(line, kv_pool.__file__)
        for text in texts:
            row = KVRow(layers, B)
            written(row, text)
            with interrupt:
                pool.keep(row, text)
        for text in texts:
            length, found = pool.find(text)
            assert length == 0 or found.read(1, 0, length)[0].flatten().tolist() == text[:length]
        if interrupt.left > 0:
            break


@pytest.mark.slow
def test_an_interrupt_of_a_cancel_leaves_no_row_behind(network: DbrxForCausalLM) -> None:
    """Whichever line of it Ctrl-C strikes; the next scheduler has all of the room."""
    for line in count(1):
        pool, interrupt = KVPool(network, budget(network, 5), B), Interrupt(line, kv_pool.__file__, scheduling.__file__)
        gone = Row(list(range(30, 40)), GREEDY)
        first = Scheduler(network, 1, pool)
        first.add(gone)
        for _ in range(3):
            first.step()
        with interrupt:
            first.cancel(gone)
        after = Row([*gone.known, 7], replace(GREEDY, max_tokens=3))
        second = Scheduler(network, 1, pool)
        assert pool.stats().used_bytes == 0
        second.add(after)
        second.step()
        assert after.ids  # all of the budget is its own
        if interrupt.left > 0:
            assert after.cached_tokens == 12
            break
    assert line > 10


def test_a_conversation_that_comes_back_reads_only_what_is_new(network: DbrxForCausalLM) -> None:
    pool, text = KVPool(network, None, B), list(range(30, 41))
    first = read(network, pool, text, 6)
    assert first.cached_tokens == 0
    others = read(network, pool, list(range(50, 60)), 6)
    longer = [*first.known, 7, 8, 9]
    second = read(network, pool, longer, 6)
    assert second.cached_tokens == len(first.known) - 1  # the newest id was never read
    assert second.ids == alone(network, longer, GREEDY)
    parted = [*first.known[:6], 99, *first.known[7:]]
    third = read(network, pool, parted, 6)
    assert third.cached_tokens == 6 and third.ids == alone(network, parted, GREEDY)
    assert others.ids == alone(network, list(range(50, 60)), GREEDY)
    stats = pool.stats()
    assert stats.used_bytes == 0 and stats.cached_bytes > 0
    assert (stats.prompt_tokens, stats.cached_tokens) == (11 + 10 + 20 + 17, 16 + 6)


def test_what_was_used_last_stays(network: DbrxForCausalLM) -> None:
    """A budget of six blocks, texts of three: the end of the least recently used text gives way first."""
    pool = KVPool(network, budget(network, 6), B)
    texts = [[start + i for i in range(3 * B)] for start in (0, 20, 40)]
    read(network, pool, texts[0])
    read(network, pool, texts[1][:-1])
    assert [pool.find(text)[0] for text in texts] == [12, 11, 0]  # and the second was used last
    pool.find(texts[0])
    read(network, pool, texts[2][:B])  # a prompt and a token: two blocks
    assert [pool.find(text)[0] for text in texts] == [12, 4, 4]
    stats = pool.stats()
    assert stats.cached_bytes <= budget(network, 6)


def test_rows_wait_until_they_fit_and_what_never_fits_is_refused(network: DbrxForCausalLM) -> None:
    """Two rows of three blocks have room, a third waits though there is a place, and none after it overtakes it."""
    pool = KVPool(network, budget(network, 7), B)
    scheduler = Scheduler(network, 4, pool)
    texts = [[start, start + 1, start + 2, start + 3, start + 4, start + 5] for start in (10, 20, 30)]
    rows = [Row(text, GREEDY) for text in (*texts, [1])]
    for row in rows:
        scheduler.add(row)
    seen = set[int]()
    while len(scheduler):
        scheduler.step()
        seen.add(sum(bool(row.ids) and not row.done for row in rows))
        assert pool.stats().used_bytes + pool.stats().cached_bytes <= budget(network, 7)
    assert max(seen) == 2
    assert [row.ids for row in rows] == [alone(network, row.known[: len(row.prompt)], GREEDY) for row in rows]
    with pytest.raises(ResourceError, match=r"a prompt of 6 tokens and a reply of up to 40 need .* MB") as fault:
        scheduler.add(Row(texts[0], SamplingParams(max_tokens=40)))
    assert "ask for fewer tokens" in fault.value.one_line and len(scheduler) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_no_block_is_lost_whoever_comes_and_goes(
    network: DbrxForCausalLM, blocks: weakref.WeakSet[KVBlock], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Rows that are added, cancelled in each phase, or end; some steps fail. What exists is what the pool counts."""
    monkeypatch.setattr(network, "prefill_chunk", 5)
    rng, most = random.Random(seed), 24
    pool = KVPool(network, budget(network, most), B)
    scheduler, rows = Scheduler(network, 3, pool), list[Row]()
    texts = [[rng.randrange(9) for _ in range(rng.randrange(1, 30))] for _ in range(12)]
    one = kv_bytes(network, 1, B)
    finished = cancelled = failed = 0
    for _ in range(300):
        match rng.choice(["add", "step", "step", "step", "cancel", "fail"]):
            case "add" if len(rows) < 6:
                text = rng.choice(texts)
                rows.append(Row(text, SamplingParams(temperature=0, max_tokens=rng.randrange(1, 9))))
                texts[rng.randrange(len(texts))] = [*text[: rng.randrange(30)], rng.randrange(9)]
                scheduler.add(rows[-1])
            case "step":
                scheduler.step()
            case "cancel" if rows:
                scheduler.cancel(rng.choice(rows))
                cancelled += 1
            case "fail" if rows and rng.random() < 0.2:
                with monkeypatch.context() as patch, pytest.raises(MemoryError):
                    patch.setattr(network.transformer.blocks[-1], "forward", fail)
                    while rows:
                        scheduler.step()
                        rows = [row for row in rows if not row.done]
                    raise MemoryError
                while rows:
                    scheduler.cancel(rows.pop())
                scheduler = Scheduler(network, 3, pool)
                failed += 1
        finished += sum(row.done for row in rows)
        rows = [row for row in rows if not row.done]
        stats = pool.stats()
        assert len(blocks) == len({kept.block for kept in pool._kept.values()} | pool._used()) <= most
        assert stats.used_bytes + stats.cached_bytes <= len(blocks) * one
    while rows:
        scheduler.cancel(rows.pop())
    assert not pool._live and pool.stats().used_bytes == 0
    assert finished > 20 and cancelled > 20 and failed > 1
    pool.clear()
    del scheduler
    gc.collect()
    assert not len(blocks) and not pool._behind


def fail(*_: object) -> None:
    raise MemoryError


def test_of_a_split_network_one_row_is_the_same_object(network: DbrxForCausalLM) -> None:
    """Followers know it by its identity, and no keys and values but those that they computed for it."""
    pool, text = OneRow(network), list(range(30, 41))
    first = read(network, pool, text, 6)
    second = read(network, pool, [*first.known, 7, 8], 6)
    third = read(network, pool, [30, 31, 99], 6)
    assert first.kv is second.kv is third.kv
    assert (second.cached_tokens, third.cached_tokens) == (16, 2)
    assert second.ids == alone(network, [*first.known, 7, 8], GREEDY)
    assert third.ids == alone(network, [30, 31, 99], GREEDY)
