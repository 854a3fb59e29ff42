"""Before and behind the program's main part, where nothing can be stopped or kept: Ctrl-C ends it at once, quietly, and
where memory does not even suffice for its modules, one line says so.

This is the first that is imported, and imports next to nothing itself.
"""

from __future__ import annotations

# Built in: the module `signal` makes enums first, which takes milliseconds.
import _signal as signal  # type: ignore[import-not-found]
import os
import sys

INTERRUPTED = 130  # 128 + SIGINT
NO_MEMORY = 5
NOT_MAPPED = (
    "failed to map segment",
    "cannot allocate memory",
    "Cannot allocate memory",
)  # as loaders of libraries say it


def end_quietly() -> None:
    """From here on Ctrl-C ends the process; where somebody else handles it, nothing changes."""
    _exchange(signal.default_int_handler, _end)


def interrupt() -> None:
    """From here on Ctrl-C raises `KeyboardInterrupt`, as Python does it."""
    _exchange(_end, signal.default_int_handler)


def tell_lack_of_memory() -> None:
    """From here on an import that finds no memory is told in one line; all else as Python tells it."""
    sys.excepthook = _tell


def lacks_memory(error: BaseException) -> bool:
    """Whether an import ended for want of memory or of addresses."""
    return isinstance(error, MemoryError) or (
        isinstance(error, ImportError | OSError) and any(sign in str(error) for sign in NOT_MAPPED)
    )


def _tell(kind: type[BaseException], error: BaseException, trace: object) -> None:
    if not lacks_memory(error):
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]
        return
    os.write(2, b"dbrx: there is too little memory to start; close other programs, or raise a limit (ulimit -v)\n")
    os._exit(NO_MEMORY)


def _end(*_: object) -> None:
    os._exit(INTERRUPTED)


def _exchange(old: object, new: object) -> None:
    try:
        if signal.getsignal(signal.SIGINT) is old:
            signal.signal(signal.SIGINT, new)
    except ValueError:  # not in the main thread, which alone hears of signals
        pass
