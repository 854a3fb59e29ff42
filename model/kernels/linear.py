"""A packed matrix in the place of nn.Linear."""

from __future__ import annotations

from torch import Tensor, nn

from .base import LinearKernel, Packed


class PackedLinear(nn.Module):
    """x [..., inputs] -> [..., outputs] in the dtype of x. The matrix is no parameter: nothing can save or move it."""

    def __init__(self, kernel: LinearKernel, packed: Packed, last: bool = False) -> None:
        """last: of the network, where numbers that are not finite must come out as such.

        Up to there the residual stream carries them.
        """
        super().__init__()
        self.kernel = kernel
        self.packed = packed
        self.restores_nan = last and not kernel.keeps_nan

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = self.kernel.each(rows, [self.packed]) if len(rows) == 1 else self.multiply(rows)
        if self.restores_nan:
            out += rows.sum(dim=1, keepdim=True) * 0
        return out.contiguous().view(*x.shape[:-1], -1).to(x.dtype)

    def multiply(self, rows: Tensor) -> Tensor:
        """Many rows: [n, inputs] -> [n, outputs]."""
        return self.kernel.run(self.kernel.prepare(rows), self.packed)
