"""A choice: how a matrix is held and multiplied on a CPU. `choose` takes the first kernel that computes right here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from . import blocks, floats, int4, int8, nibbles, rows
from .kernel import MatrixKernel, Packed, Rows
from .linear import PackedLinear

__all__ = ["KERNELS", "ROWS", "MatrixKernel", "Packed", "PackedLinear", "Rows", "choose", "probe"]

# In order of preference; the last of each runs everywhere.
KERNELS: dict[str, tuple[Callable[..., MatrixKernel], ...]] = {
    "float32": (partial(floats.OneDnnKernel, torch.float32),),
    "bfloat16": (partial(floats.OneDnnKernel, torch.bfloat16), partial(rows.FloatRows, torch.bfloat16)),
    "int8": (int8.FbgemmKernel, partial(int8.FbgemmKernel, int8.SUMMED), int8.AtenKernel),
    "int4": (int4.AtenKernel, int4.PlainKernel),
}
# For the compiled functions of a decode step.
ROWS: dict[str, tuple[Callable[..., MatrixKernel], ...]] = {
    "float32 rows": (partial(rows.FloatRows, torch.float32),),
    "bfloat16 rows": (partial(rows.FloatRows, torch.bfloat16),),
    "bfloat16 blocks": (blocks.FloatBlocks, partial(rows.FloatRows, torch.bfloat16)),
    "int8 rows": (rows.OneDnnByteRows, rows.ByteRows),
    "int4 rows": (nibbles.NibbleRows, int4.AtenKernel, int4.PlainKernel),
}
TOLERANCE = 0.02  # of the largest output; activations in 8 bits err by 0.5 %


@cache
def choose(name: str, group: int | None = None) -> MatrixKernel | None:
    """The first kernel of a name that is right on this CPU; None if there is none. group: of int4."""
    settings = {} if group is None else {"group": group}
    return next((kernel for build in (KERNELS | ROWS)[name] if not fault(kernel := build(**settings))), None)


def probe() -> dict[str, str]:
    """Which kernel each kind of weights has here, in words, for people."""
    chosen = {name: choose(name) for name in KERNELS}
    return {name: kernel.name if kernel else "as stored" for name, kernel in chosen.items()}


def fault(kernel: MatrixKernel) -> str | None:
    """Why a kernel cannot be used here, or None: tiny products, with the extremes where sums of bytes overflow."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    weight[0], weight[1] = 1, torch.arange(256) % 2  # all at the upper end: 255 x 127, twice, is more than 16 bits hold
    for n in (1, 5, 40):
        x = torch.randn(n, 256, generator=generator)
        x[0] = 1
        try:
            packed, meant = _both(kernel, weight)
            out = kernel.run(kernel.prepare(x.to(kernel.dtype)), packed).float()
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            return str(error).partition("\n")[0]
        exact = x @ meant.t()
        if not bool(((out - exact).abs() <= TOLERANCE * exact.abs().amax(1, keepdim=True)).all()):
            return "computes wrong numbers on this CPU"
    return None


def _both(kernel: MatrixKernel, weight: Tensor) -> tuple[Packed, Tensor]:
    """A matrix as the kernel holds it, and as it is meant."""
    if kernel.quantization == "none":
        return kernel.pack(weight), weight
    stored = kernel.quantize(weight)
    if isinstance(kernel, int4.Int4):
        return kernel.load(stored), int4.dequantize(stored, kernel.group)
    return kernel.load(stored), int8.dequantize(stored)
