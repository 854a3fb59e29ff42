"""How often each expert of a checkpoint was chosen, kept between processes: a card gets those of most use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from operator import add
from pathlib import Path

from dbrx_cli.private import data_folder, private_folder, write_private
from model.errors import DbrxError
from model.expert_use import Counts, known
from model.trust import untrusted

FOLDER = "experts"
MOST = 2**17  # choices of a layer that count, 32,768 tokens of four: of more, old ones fade


def use_of(source: Path) -> Counts:
    """Counts [layers][experts] of a checkpoint's folder or file; none where others may have written them."""
    with suppress(DbrxError, OSError, TypeError, ValueError):
        path = _path(source)
        if untrusted(path) is None:
            return [[int(count) for count in counts] for counts in json.loads(path.read_text("utf-8"))]
    return ()


def keep_use(source: Path, used: Counts) -> None:
    """Keep the counts of a checkpoint. They only save time: no fault is worth a word."""
    with suppress(DbrxError, OSError):
        path = _path(source)
        private_folder(path.parent)
        write_private(path, json.dumps([_faded(counts) for counts in used]), over=True)


def add_use(source: Path, more: Counts) -> None:
    """Keep these counts beside those that are kept."""
    before = known(use_of(source), len(more), len(more[0]))
    keep_use(source, [list(map(add, *counts)) for counts in zip(before, more, strict=True)])


def _faded(counts: Sequence[int]) -> list[int]:
    most = max(MOST, sum(counts))
    return [count * MOST // most for count in counts]


def _path(source: Path) -> Path:
    name = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:32]
    return data_folder() / FOLDER / f"{name}.json"
