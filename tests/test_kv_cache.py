"""The cache against plain lists of what each row was given."""

from __future__ import annotations

import random

import pytest
import torch

from model.attention import AttentionPlan
from model.kv_cache import KVCache

CPU = torch.device("cpu")


def test_rows_hold_their_tokens_without_gaps() -> None:
    rng = torch.Generator().manual_seed(3)
    cache, rows = KVCache(2, rows=3, block_tokens=2), [[], [], []]
    for step in range(12):
        seq = 1 + step % 4
        valid = torch.rand(3, seq, generator=rng) > 0.4 if step % 3 else None
        plan = AttentionPlan(cache.lengths, seq, valid, CPU)
        k = torch.randn(3, seq, 1, 4, generator=rng)
        for layer in range(2):
            keys, values = cache.append(layer, k + layer, -k, plan)
        cache.advance(plan)
        for row in range(3):
            rows[row] += [k[row, i] for i in range(seq) if valid is None or valid[row, i]]
            assert cache.lengths[row] == len(rows[row])
            if rows[row]:
                assert torch.equal(keys[row, : len(rows[row])], torch.stack(rows[row]) + 1)
                assert torch.equal(values[row, : len(rows[row])], -torch.stack(rows[row]))


def test_a_step_counts_only_when_it_is_complete() -> None:
    cache = KVCache(1)
    plan = AttentionPlan(cache.lengths, 3, None, CPU)
    cache.append(0, torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), plan)
    assert len(cache) == 0
    cache.advance(plan)
    assert len(cache) == cache.get_seq_length() == 3


def test_trim_forgets_and_append_overwrites() -> None:
    cache = KVCache(1)
    for value, count in ((1.0, 5), (2.0, 2)):
        plan = AttentionPlan(cache.lengths, count, None, CPU)
        part = torch.full((1, count, 1, 1), value)
        keys, _ = cache.append(0, part, part, plan)
        cache.advance(plan)
        if value == 1:
            cache.trim(0, 3)
    assert keys.flatten().tolist() == [1, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="cannot trim"):
        cache.trim(0, 6)


def test_growing_keeps_what_is_there() -> None:
    cache = KVCache(1, block_tokens=8)
    for i in range(20):
        plan = AttentionPlan(cache.lengths, 1, None, CPU)
        keys, _ = cache.append(0, torch.full((1, 1, 1, 1), float(i)), torch.zeros(1, 1, 1, 1), plan)
        cache.advance(plan)
    assert keys.flatten().tolist() == list(range(20))
    assert cache.nbytes == 2 * 24 * 4


def test_rows_join_are_copied_and_leave() -> None:
    """Random additions, copies, drops and appends, against lists."""
    rng = random.Random(5)
    cache, rows = KVCache(2, rows=1, block_tokens=4), [list[float]()]
    other = KVCache(2, rows=2, block_tokens=4)
    theirs = [[-1.0 - i for i in range(6)], [-11.0 - i for i in range(6)]]
    plan = AttentionPlan(other.lengths, 6, None, CPU)
    for layer in range(2):
        other.append(layer, torch.tensor(theirs)[..., None, None], torch.zeros(2, 6, 1, 1), plan)
    other.advance(plan)
    for step in range(200):
        match rng.choice(["add", "copy", "drop", "append", "append", "trim"]):
            case "add" if len(rows) < 6:
                assert cache.add() == len(rows)
                rows.append([])
            case "copy":
                row, source, length = rng.randrange(len(rows)), rng.randrange(2), rng.randrange(7)
                cache.copy(row, other, source, length)
                rows[row] = theirs[source][:length]
            case "drop" if len(rows) > 1:
                row = rng.randrange(len(rows))
                cache.drop(row)
                rows[row] = rows[-1]
                del rows[-1]
            case "trim":
                row = rng.randrange(len(rows))
                rows[row] = rows[row][: rng.randrange(len(rows[row]) + 1)]
                cache.trim(row, len(rows[row]))
            case "append":
                plan = AttentionPlan(cache.lengths, 2, None, CPU)
                new = torch.tensor([[step + row / 10, step + 0.5] for row in range(len(rows))])[..., None, None]
                for layer in range(2):
                    keys, values = cache.append(layer, new, -new, plan)
                cache.advance(plan)
                for row, ids in enumerate(rows):
                    ids += new[row].flatten().tolist()
                    assert keys[row, : len(ids)].flatten().tolist() == pytest.approx(ids)
                    mine = [i for i, value in enumerate(ids) if value >= 0]  # the others' values are zeros
                    assert values[row].flatten()[mine].tolist() == pytest.approx([-ids[i] for i in mine])
        assert cache.lengths == [len(ids) for ids in rows] and len(cache.rows) == len(rows)
    with pytest.raises(ValueError, match="cannot take"):
        cache.copy(0, other, 0, 7)
