"""The seam between routing and arithmetic: how one expert lies in memory, and the product with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..formats import FloatExpert, QuantizedExpert, Weights

Packed = tuple[Any, ...]  # one expert as its kernel wants it; opaque to everybody else
# A layer's source of packed experts: gives each that is asked for, with its id, in the order in which they are at hand.
Fetch = Callable[[Sequence[int]], Iterable[tuple[int, Packed]]]


class Kernel(Protocol):
    """One way to hold an expert and to compute with it. Without state of a layer: one object serves them all."""

    name: str  # what `doctor` and `bench` show
    quantization: str  # the stored form that `load` takes: int8, int4; "none" has no `load`

    def pack(self, expert: FloatExpert) -> Packed:
        """Quantize or reorder an expert; never a view of what it was made from, unless the kernel reads floats."""

    def quantize(self, expert: FloatExpert) -> QuantizedExpert:
        """An expert as it is stored."""

    def load(self, stored: QuantizedExpert) -> Packed:
        """The same from an expert that is stored quantized."""

    def nbytes(self, hidden: int, d_model: int, itemsize: int) -> int:
        """Bytes of a packed expert of that size; itemsize: of the floats it is packed from."""

    def prepare(self, x: Tensor) -> Any:
        """What all experts of a layer share of x [n, d_model], such as its quantized form: once a layer."""

    def run(self, prepared: Any, rows: Tensor | None, packed: Packed) -> Tensor:
        """The expert's output [len(rows), d_model] for those rows of x (None: all), in the dtype of x."""

    def each(self, x: Tensor, experts: Sequence[Packed]) -> Tensor:
        """Every expert's output for the one row x [1, d_model]: [len(experts), d_model], in the dtype of x.

        An expert's numbers do not depend on those beside it.
        """


class OneByOne:
    """`each` for kernels that gain nothing from several experts at once."""

    def each(self: Kernel, x: Tensor, experts: Sequence[Packed]) -> Tensor:
        prepared = self.prepare(x)
        return torch.cat([self.run(prepared, None, packed) for packed in experts])


def packed_expert(
    kernel: Kernel, weights: Weights, layer: int, expert: int, data: tuple[Tensor, ...] | None = None
) -> Packed:
    """One expert as `kernel` wants it, however `weights` store it; `data` as in `Weights.expert`."""
    if kernel.quantization == "none":
        return kernel.pack(weights.expert(layer, expert, data))
    if weights.quantization == kernel.quantization:
        return kernel.load(weights.quantized_expert(layer, expert, data))
    stored = kernel.quantize(weights.expert(layer, expert, data))
    del data  # the floats, which may be large, are done with
    return kernel.load(stored)


def mix(kernel: Kernel, fetch: Fetch, n_experts: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """x [n, d_model], chosen [n, top_k] ids, weights [n, top_k] -> [n, d_model], the weighted sum of experts' outputs.

    Each expert computes when `fetch` gives it; what they give is added in an order of its own, so that the sum is the
    same wherever they come from.
    """
    if len(x) == 1:  # a decode step: nothing to sort or gather
        ids = chosen[0].tolist()
        outputs = {expert: kernel.each(x, [packed]) for expert, packed in fetch(ids)}
        return weights @ torch.cat([outputs[expert] for expert in ids])
    prepared = kernel.prepare(x)
    out = torch.zeros_like(x)
    jobs = dict(_jobs(n_experts, chosen, weights))
    done: dict[int, Tensor] = {}
    waiting = deque(jobs)
    for expert, packed in fetch(list(jobs)):
        rows, weight = jobs[expert]
        done[expert] = kernel.run(prepared, rows, packed) * weight
        while waiting and waiting[0] in done:
            first = waiting.popleft()
            rows = jobs[first][0]
            if rows is None:
                out += done.pop(first)
            else:
                out.index_add_(0, rows, done.pop(first))
    return out


def _jobs(n_experts: int, chosen: Tensor, weights: Tensor) -> Iterator[tuple[int, tuple[Tensor | None, Tensor]]]:
    """The experts that are chosen, ascending, with the rows of x that each computes (None: all) and their weights."""
    for expert, places in places_by_expert(n_experts, chosen):
        rows = places // chosen.shape[1] if len(places) < len(chosen) else None
        yield expert, (rows, weights.flatten()[places, None])


def places_by_expert(n_experts: int, chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The experts that are chosen, ascending, with their places among the ids [n, top_k], counted row by row."""
    ids = chosen.flatten()
    places = torch.split(ids.argsort(stable=True), ids.bincount(minlength=n_experts).tolist())
    return ((expert, which) for expert, which in enumerate(places) if len(which))
