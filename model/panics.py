"""Libraries in Rust: where they panic on what others wrote, that is a fault like any other, told in our words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import DbrxError

STDERR = 2


@contextmanager
def panics_told(fault: Callable[[str], DbrxError]) -> Iterator[None]:
    """A panic inside ends as `fault` of what it says: it is no `Exception` of Python."""
    try:
        with panics_unheard():
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise fault(str(error)) from None


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
