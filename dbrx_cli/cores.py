"""How the threads of a computation wait for each other; to be settled before torch is imported."""

from __future__ import annotations

import os

SPINS = 5000  # about a tenth of a millisecond: most pauses between two kernels are shorter


def settle_waiting() -> None:
    """Let OpenMP's threads spin shortly before they sleep, on a machine that has nothing else to do.

    To wake a sleeping thread takes 50 to 100 microseconds, and a token of a small model has a hundred kernels: two
    cores decoded 1.5 to 2 times faster with spinning. But a thread that spins while other programs want its core keeps
    it from the one that is waited for: on a busy machine decoding was 2 to 5 times slower, so there they sleep at once.
    """
    if any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        return
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
    os.environ["GOMP_SPINCOUNT"] = "0" if busy else str(SPINS)
