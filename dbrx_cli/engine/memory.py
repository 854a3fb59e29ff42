"""What torch says when memory runs out, told with sizes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from model.errors import ResourceError

if TYPE_CHECKING:
    from model.causal_lm import DbrxForCausalLM
    from model.kv_cache import KVCache

# torch has a class of its own for accelerators only; on the CPU it is a RuntimeError with one of these texts. The last
# four are of libraries that find no addresses: threads, oneDNN, C++, and what loads libraries.
SIGNS = re.compile(
    "can(no|')t allocate memory|out of memory|not enough memory"
    "|can't start new thread|could not create a primitive|bad_alloc|failed to map segment",
    re.IGNORECASE,
)
WANTED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]i?B)", re.IGNORECASE)


def memory_fault(error: Exception, network: DbrxForCausalLM, cache: KVCache) -> ResourceError | None:
    """The fault to tell if memory ran out; None if `error` is something else."""
    if not lacks_memory(error):
        return None
    plan = network.load_plan  # what is packed for a kernel is no parameter
    held = plan.weights.values() if plan is not None else ()
    weights = sum(held) or sum(parameter.nbytes for parameter in network.parameters())
    wanted = WANTED.search(str(error))
    more = f", and {_size(float(wanted[1]))} more were wanted" if wanted and wanted[2] == "bytes" else ""
    return ResourceError(
        f"out of memory: the weights take {_size(weights)}, "
        f"keys and values of {len(cache)} tokens {_size(cache.nbytes)}{more}",
        "shorten the prompt, or choose a smaller --context or --dtype",
    )


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out, in the words of whichever library."""
    return isinstance(error, MemoryError) or bool(SIGNS.search(str(error)))


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
