"""What the ranks above 0 of a torchrun do: load their slices as rank 0 says, and compute along with it."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from model.errors import InputError

if TYPE_CHECKING:
    from dbrx_cli.options import ModelOptions
    from model.parallel import Ranks

ENDED = (128 + signal.SIGTERM, 128 + signal.SIGHUP)  # codes of a chat that a signal ended
_led: list[Ranks] = []  # by this process, if it is rank 0 of a torchrun


def is_follower() -> bool:
    """Whether torchrun started this process beside rank 0. It reads no command line and no stdin: rank 0 does."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def is_split() -> bool:
    """Whether torchrun started several processes for one model."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def needs_one_process(what: str) -> None:
    """`InputError` in rank 0 of a torchrun with several ranks; torchrun ends the others when it fails."""
    if is_split() and not is_follower():
        raise InputError(f"{what} needs a single process that has the whole model", "run it without torchrun")


def follow() -> None:
    """Serve rank 0 until it has no more to compute."""
    from dbrx_cli.engine.load import find_model, load_network
    from dbrx_cli.options import OutputOptions
    from dbrx_cli.report import Report
    from model import parallel

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; rank 0 answers it
    ranks = parallel.join()
    assert ranks is not None
    report = Report(OutputOptions(quiet=True))
    options = ranks.broadcast()
    ranks.follow(load_network(find_model(options, report), options, report, ranks))
    ranks.part_ways()


def lead(options: ModelOptions) -> Ranks | None:
    """Have the other ranks load the same model; None in a process that runs alone.

    `InputError` for options that a part of a model cannot have.
    """
    if not is_split():
        return None
    for flag, given in (
        ("--quantize", options.quantize not in ("auto", "none")),
        ("--device-map", options.device_map != "auto"),
        ("--offload", options.offload in ("cpu", "disk")),
        ("--expert-cache", options.expert_cache is not None),
    ):
        if given:
            needs_one_process(flag)
    from model import parallel

    ranks = parallel.join()
    assert ranks is not None
    ranks.broadcast(options)
    _led.append(ranks)
    return ranks


def leave(code: int) -> NoReturn:
    """End the process. Stdout is flushed already.

    Among ranks, without the interpreter's own end: a thread of gloo may still hold a tensor, and letting go of it
    while the interpreter is taken down aborts the process. After SIGTERM or SIGHUP too, when all is saved and whoever
    sent it waits: taking torch down costs a second of CPU, which was ten on a machine with a load of 20.
    """
    if not _led and not is_follower() and code not in ENDED:
        sys.exit(code)
    for ranks in _led:
        ranks.part_ways()
    sys.stderr.flush()
    os._exit(code)
