"""Where the experts of a checkpoint go in vLLM's modules; plain names and tensors, without vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

STACKED = re.compile(r"(.+\.ffn\.experts)\.mlp\.(w1|v1|w2)")
# Of a gated expert, down(act(gate(x)) * up(x)): vLLM holds gate and up in one tensor, and calls them w1 and w3.
PLACE = {"w1": ("w13_weight", "w1"), "v1": ("w13_weight", "w3"), "w2": ("w2_weight", "w2")}


def place(name: str, parameters: Iterable[str]) -> tuple[str, str] | None:
    """A tensor of a checkpoint -> the parameter that takes it and which part of it; None if it holds no experts.

    Where the parameter lies inside `experts` differs: in vLLM 0.32 it is `experts.routed_experts.w13_weight`, before
    that `experts.w13_weight`. The one that is there is taken; `KeyError` if there is none.
    """
    found = STACKED.fullmatch(name)
    if found is None:
        return None
    leaf, part = PLACE[found[2]]
    for parameter in parameters:
        if parameter.startswith(f"{found[1]}.") and parameter.endswith(f".{leaf}"):
            return parameter, part
    raise KeyError(f"{name}: vLLM's module has no {found[1]}...{leaf} to take it")


def experts(stacked: Tensor, part: str, count: int) -> Iterator[Tensor]:
    """The experts in a checkpoint's tensor [experts * ffn, d_model], as vLLM has them: gate and up [ffn, d_model], down
    [d_model, ffn].
    """
    for expert in stacked.view(count, -1, stacked.shape[-1]):
        yield expert.t() if part == "w2" else expert
