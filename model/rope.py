"""Rotary positions (RoFormer, arXiv 2104.09864), rotate-half layout, angles in float32."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

WINDOW = 256  # positions whose angles are kept, for those who ask for one after the other
WINDOWS = 32  # that are kept, 0.26 MB each in DBRX: rows of a batch are at different places


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, the first half of the sines negated.

    positions [batch, seq] -> two float32 tensors [batch, seq, 1, head_dim].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angles = positions[..., None, None].float() * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotary_rows(positions: Sequence[int], head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The table of a position of each row: [rows, 1, 1, head_dim] each.

    A dozen small operations a token, when all that was in the caches is a model's weights, were 1 % of its time; and
    PyTorch's cosine of several rows wakes threads, which then take the cores from the native library's.
    """
    windows = [_window(position - position % WINDOW, head_dim, theta, device) for position in positions]
    cos, sin = (
        [part.narrow(1, position % WINDOW, 1) for part, position in zip(parts, positions, strict=True)]
        for parts in zip(*windows, strict=True)
    )
    return (cos[0], sin[0]) if len(cos) == 1 else (torch.cat(cos), torch.cat(sin))


@lru_cache(maxsize=WINDOWS)
def _window(start: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # for every later caller
        return rotary_table(torch.arange(start, start + WINDOW, device=device)[None], head_dim, theta)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x [batch, seq, heads, head_dim] by its angle, in float32."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
