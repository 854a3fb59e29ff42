"""How the threads of a computation wait for each other, and in which pages its memory comes; settled before torch."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from model.errors import ResourceError

SPINS = 20_000  # some tenths of a millisecond: most pauses between two kernels are shorter
SAMPLES, PAUSE = 8, 0.002  # of what else runs: moments, and seconds between them
LOOKS, LOOK_PAUSE = 8, 0.05  # before a machine is called busy, and seconds between them
LOADAVG, STATM = Path("/proc/loadavg"), Path("/proc/self/statm")
# Addresses in bytes: of torch's libraries, of a small network at work (250 MB seen), and of a thread's stack and heap.
TORCH, WORK, THREAD = 650_000_000, 300_000_000, 16_000_000


def configure_openmp() -> None:
    """Let OpenMP's threads spin shortly before they sleep, on a machine that has nothing else to do.

    To wake a sleeping thread takes 50 to 100 microseconds, and a token of a small model has a hundred kernels: two
    cores decoded 1.5 times faster with spinning. But a thread that spins while other programs want its core keeps it
    from the one that is waited for: on a busy machine decoding was 2 to 5 times slower, so there they sleep at once.
    Busy it is if it stays so: a large program that is just ending is no reason to be slow from here on.

    Where native kernels compute, their own threads spin, and OpenMP's must not keep the cores from them.
    """
    from model import native

    if any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        return
    os.environ["GOMP_SPINCOUNT"] = "0" if native.status().variant or _stays_busy() else str(SPINS)


NUMBER, YES_NO, SIZE = r"[1-9]\d{0,6}", "true|false|0|1", r"\d{1,9}\s*[bkmg]?"
# What OpenMP's library takes; of anything else it complains in words of its own, beside the answer.
TAKEN = {
    "OMP_NUM_THREADS": rf"{NUMBER}(\s*,\s*{NUMBER})*", "OMP_THREAD_LIMIT": NUMBER, "OMP_MAX_ACTIVE_LEVELS": r"\d{1,6}",
    "OMP_DYNAMIC": YES_NO, "OMP_NESTED": YES_NO, "OMP_STACKSIZE": SIZE, "GOMP_STACKSIZE": SIZE,
    "OMP_WAIT_POLICY": "active|passive", "GOMP_SPINCOUNT": r"\d{1,12}\s*[kmgt]?|infinite|infinity",
}  # fmt: skip


def drop_wrong() -> Iterator[str]:
    """Take wrong settings of OpenMP out of the environment before its library reads them; a sentence for each."""
    for name, taken in TAKEN.items():
        value = os.environ.get(name)
        if value is not None and not re.fullmatch(taken, value.strip(), re.IGNORECASE):
            del os.environ[name]
            yield f"{name} is {value[:80]!r}, which is no value of it, and is not used"


def settle_pages() -> None:
    """Have PyTorch ask Linux for huge pages, unless the user chose: there are few to give back when the program ends.

    2 GB took 0.006 s instead of 0.15.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def require_addresses() -> None:
    """`ResourceError` where a limit (ulimit -v) leaves too few addresses for what is imported and started from here on.

    Libraries that find none end the process by signal 11, without a word.
    """
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        used = int(STATM.read_text().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux
        return
    wanted = (0 if "torch" in sys.modules else TORCH) + WORK + THREAD * (os.cpu_count() or 1)
    if limit != resource.RLIM_INFINITY and limit - used < wanted:
        raise ResourceError(
            f"a limit leaves {max(0, limit - used) / 1e6:.0f} MB of addresses, and {wanted / 1e6:.0f} are needed "
            "before any weights are read",
            "raise it: ulimit -v unlimited",
        )


def _stays_busy() -> bool:
    for look in range(LOOKS):
        time.sleep(LOOK_PAUSE if look else 0)
        if others_running() <= (os.cpu_count() or 1) / 4:
            return False
    return True


def others_running() -> float:
    """How many threads of others want a core right now, on average over some moments; 0 where nothing tells.

    Not the load average: that still counts what ended a minute ago.
    """
    counts = []
    for _ in range(SAMPLES):
        try:
            running = LOADAVG.read_text().split()[3].partition("/")[0]
        except OSError:
            return 0.0
        counts.append(int(running) - 1)  # this one runs
        time.sleep(PAUSE)
    return sum(counts) / len(counts)
