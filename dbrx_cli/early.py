"""Ctrl-C before and behind the program's main part, where nothing can be stopped or kept: it ends at once, quietly.

This is the first that is imported, and imports next to nothing itself.
"""

from __future__ import annotations

# Built in: the module `signal` makes enums first, which takes milliseconds.
import _signal as signal  # type: ignore[import-not-found]
import os

INTERRUPTED = 130  # 128 + SIGINT


def end_quietly() -> None:
    """From here on Ctrl-C ends the process; where somebody else handles it, nothing changes."""
    _exchange(signal.default_int_handler, _end)


def interrupt() -> None:
    """From here on Ctrl-C raises `KeyboardInterrupt`, as Python does it."""
    _exchange(_end, signal.default_int_handler)


def _end(*_: object) -> None:
    os._exit(INTERRUPTED)


def _exchange(old: object, new: object) -> None:
    try:
        if signal.getsignal(signal.SIGINT) is old:
            signal.signal(signal.SIGINT, new)
    except ValueError:  # not in the main thread, which alone hears of signals
        pass
