"""The cache against plain lists of what each row was given."""

from __future__ import annotations

import random

import pytest
import torch

from model.attention import AttentionPlan
from model.kv_cache import KVCache, KVRow

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


def test_rows_take_what_others_have_and_go_their_ways() -> None:
    """Random rows that come, leave, take another's front, are trimmed and appended to, in steps of some of them."""
    rng, rows = random.Random(5), [(KVRow(2, 4), list[float]())]
    for step in range(400):
        row, ids = rng.choice(rows)
        match rng.choice(["come", "leave", "take", "append", "append", "trim"]):
            case "come" if len(rows) < 6:
                rows.append((KVRow(2, 4), []))
            case "leave" if len(rows) > 1:
                rows.remove((row, ids))
            case "take":
                other, theirs = rng.choice(rows)
                length = rng.randrange(len(theirs) + 1)
                row.take(other, length)
                ids[:] = theirs[:length]
            case "trim":
                del ids[rng.randrange(len(ids) + 1) :]
                row.trim(len(ids))
            case "append":
                some = rng.sample(rows, rng.randrange(1, len(rows) + 1))
                cache = KVCache.of([each for each, _ in some])
                plan = AttentionPlan(cache.lengths, 2, None, CPU)
                new = torch.tensor([[step + i / 8, step + 0.75] for i in range(len(some))])[..., None, None]
                for layer in range(2):
                    keys, values = cache.append(layer, new + layer, -new, plan)
                cache.advance(plan)
                for i, (_, known) in enumerate(some):
                    known += new[i].flatten().tolist()
                    assert keys[i, : len(known)].flatten().tolist() == [each + 1 for each in known]
                    assert values[i, : len(known)].flatten().tolist() == [-each for each in known]
        for each, known in rows:  # whatever became of one, the others hold what they held
            assert each.length == len(known)
            assert not known or each.read(1, 0, len(known))[1].flatten().tolist() == [-value for value in known]
    with pytest.raises(ValueError, match="cannot take"):
        KVRow(2, 4).take(rows[0][0], len(rows[0][1]) + 1)
