"""What a decode step computes, as functions of activations and weights that PyTorch's compiler turns into few loops.

Each reads its weights once, row by row, in the order in which they lie in memory, and computes in float32. A matrix is
its values [outputs, inputs], and where they are bytes a scale for each output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from ..config import DbrxConfig
from ..moe import ACTIVATIONS
from ..quantization.rows import WORD
from ..rope import rotate
from ..transformer import EPS

Matrix = tuple[Tensor, ...]


LONGEST = 4096  # numbers that are added in one loop: of more, PyTorch's compiler adds in steps, at half the speed
OFFSET = 0x00808080  # makes bytes unsigned, all but the highest, whose sign is that of its word
MASKS = 0xFF, 0xFF00, 0xFF0000, -0x1000000
STREAMS = 4  # runs of rows that a loop reads side by side where they are long


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """x [inputs] float32 -> [outputs] float32."""
    values, *scale = matrix
    outputs, inputs = values.shape
    if scale and values.dtype == torch.float32:  # by name only: see `WordRows`
        out = _of_words(x, values)
    elif inputs <= LONGEST:
        out = (values.float() * x).sum(-1)
    else:
        pieces = next(n for n in range(2, inputs + 1) if inputs % n == 0 and inputs // n <= LONGEST)
        runs = values.chunk(STREAMS) if outputs % STREAMS == 0 else (values,)
        out = torch.cat([(rows.float() * x).view(len(rows), pieces, -1).sum(-1).sum(-1) for rows in runs])
    return out * scale[0] if scale else out


def _of_words(x: Tensor, words: Tensor) -> Tensor:
    """As `product`, of `WordRows`: a byte is a float that is exact where it stands in its word, shifted afterwards."""
    numbers = words.view(torch.int32) ^ OFFSET
    runs = pad(x, (0, -len(x) % WORD)).view(WORD, -1)
    out = -128 * runs[:-1].sum()
    for k, (mask, run) in enumerate(zip(MASKS, runs, strict=True)):
        out = out + ((numbers & mask).float() * run).sum(-1) * 2.0 ** (-8 * k)
    return out


def normalize(x: Tensor, weight: Tensor) -> Tensor:
    """The row x, of any float type and shape, normalized: [d_model] float32."""
    return layer_norm(x.flatten().float(), weight.shape, weight.float(), eps=EPS)


class AttendIn(nn.Module):
    """The first half of attention: norm, one projection, clamp, rotation."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, Wqkv: Matrix) -> tuple[Tensor, Tensor, Tensor]:
        """x [1, 1, d_model] -> queries, keys and values [1, 1, heads, head_dim] in the dtype of x."""
        attn, heads, width = self.config.attn_config, self.config.n_heads, self.config.head_dim
        qkv = product(normalize(x, norm), Wqkv).view(1, 1, -1, width)
        if attn.clip_qkv is not None:
            qkv = qkv.clamp(-attn.clip_qkv, attn.clip_qkv)
        q, k, v = torch.split(qkv, [heads, attn.kv_n_heads, attn.kv_n_heads], dim=2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)


class AttendOut(nn.Module):
    """The second half of attention, then norm and router."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.ffn = config.ffn_config

    def forward(
        self, x: Tensor, y: Tensor, out_proj: Matrix, norm: Tensor, router: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [1, 1, d_model], y of as many numbers, what the heads found -> the residual stream like x, its norm
        [1, d_model] float32, probabilities [1, experts] like x; weights float32 and ids of the chosen, [1, top_k] each.
        """
        x = (x.flatten().float() + product(y.flatten().float(), out_proj)).to(x.dtype)
        normed = normalize(x, norm)
        probabilities = product(normed, (router,)).softmax(-1)
        weights, chosen = probabilities.topk(self.ffn.moe_top_k)
        if (p := self.ffn.moe_normalize_expert_weights) is not None:
            weights = weights / weights.norm(p=p)
        return x[None, None], normed[None], probabilities.to(x.dtype)[None], weights[None], chosen[None]


class Experts(nn.Module):
    """The chosen experts of a layer, weighted and added."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[str(config.ffn_config.activation)]

    def forward(
        self, x: Tensor, normed: Tensor, weights: Tensor, experts: list[tuple[Matrix, Matrix, Matrix]]
    ) -> Tensor:
        """x [1, 1, d_model], normed [1, d_model], weights [1, top_k], as many w1, v1, w2 -> x with what they add."""
        row, out = normed[0], x.flatten().float()
        for i, (w1, v1, w2) in enumerate(experts):
            hidden = self.activation(product(row, w1)) * product(row, v1)
            out = out + product(hidden * weights[0, i], w2)
        return out.to(x.dtype).view_as(x)


class Head(nn.Module):
    """The product with the last matrix."""

    def forward(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [1, 1, d_model] -> logits [1, 1, vocab] like x."""
        return product(x.flatten().float(), matrix).to(x.dtype)[None, None]
