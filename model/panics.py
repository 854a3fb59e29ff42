"""Libraries in Rust: what they write on stderr when they panic, before Python hears of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2


@contextmanager
def panics_unheard() -> Iterator[None]:
    """Keep what is written to the file behind stderr meanwhile; the panic itself comes as an exception."""
    try:
        kept = os.dup(STDERR)
    except OSError:  # there is no stderr
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, STDERR)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
