"""What is computed, as functions of activations and weights that PyTorch's compiler turns into few loops.

A decode step is `Attend`, `Experts` and `Head`; of many rows, `Linear` and `Expert` are the products.
Matrices are held, and multiplied, as `products` says; all else is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ..config import DbrxConfig
from ..moe import ACTIVATIONS
from ..rope import rotate
from ..transformer import EPS
from .many import Many
from .products import LINE, STREAMS, FloatProduct, Matrix, Product, kept


def normalize(x: Tensor, weight: Tensor) -> Tensor:
    """The row x, of any float type and shape, normalized: [d_model] float32."""
    return layer_norm(x.flatten().float(), weight.shape, weight.float(), eps=EPS)


class Attend(nn.Module):
    """The first half of a block: attention between two norms, and the router."""

    def __init__(self, config: DbrxConfig, product: Product) -> None:
        super().__init__()
        self.config = config
        self.product = product

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        seen: Tensor,
        norm_1: Tensor,
        Wqkv: Matrix,
        out_proj: Matrix,
        norm_2: Tensor,
        router: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [1, 1, d_model] -> the residual stream like x, its norm [1, d_model] float32, probabilities [1, experts]
        like x; weights float32 and ids of the chosen, [1, top_k] each.

        keys, values [1, kv_heads, capacity, head_dim]: this token's are written at the last position of `seen`
        [tokens], which counts from 0.
        """
        attn, heads, width = self.config.attn_config, self.config.n_heads, self.config.head_dim
        qkv = times(self.product, normalize(x, norm_1), Wqkv).view(1, 1, -1, width)
        if attn.clip_qkv is not None:
            qkv = qkv.clamp(-attn.clip_qkv, attn.clip_qkv)
        q, k, v = torch.split(qkv, [heads, attn.kv_n_heads, attn.kv_n_heads], dim=2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        for buffer, part in ((keys, k), (values, v)):
            buffer.index_copy_(2, seen[-1:], part.transpose(1, 2).to(buffer.dtype))
        # Not sliced: a slice would ask whether so many tokens are there.
        shape = attn.kv_n_heads, seen.shape[0], width
        y = attend(q[0, 0], *(buffer.as_strided(shape, buffer.stride()[1:]) for buffer in (keys, values)))
        x = (x.flatten().float() + times(self.product, y.flatten(), out_proj)).to(x.dtype)
        normed = normalize(x, norm_2)
        probabilities = times(FloatProduct(), normed, (router,)).softmax(-1)
        weights, chosen = probabilities.topk(self.config.ffn_config.moe_top_k)
        if (p := self.config.ffn_config.moe_normalize_expert_weights) is not None:
            weights = weights / weights.norm(p=p)
        return x[None, None], normed[None], probabilities.to(x.dtype)[None], weights[None], chosen[None]


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [heads, head_dim] float32, keys and values [kv_heads, tokens, head_dim] -> [heads, head_dim].

    The queries of a group are written out, so that a loop reads each key and each value once for all of them.
    """
    queries = kept(q * q.shape[-1] ** -0.5).view(len(keys), -1, q.shape[-1])
    scores = torch.stack([(keys.float() * one[:, None]).sum(-1) for one in queries.unbind(1)], dim=1)
    weights = kept(scores.softmax(-1)).unbind(1)  # else divided again for each number of each value
    parts = torch.split(values.float(), LINE, -1)  # summed in one loop, which so reads a value as a whole
    found = [(one[..., None] * part).sum(1) for one in weights for part in parts]
    return torch.cat(found, dim=-1).view_as(q)


class Experts(nn.Module):
    """The chosen experts of a layer, weighted and added."""

    def __init__(self, config: DbrxConfig, product: Product) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[str(config.ffn_config.activation)]
        self.product = product

    def forward(
        self, x: Tensor, normed: Tensor, weights: Tensor, chosen: Tensor, w1: Matrix, v1: Matrix, w2: Matrix
    ) -> Tensor:
        """x [1, 1, d_model], normed [1, d_model], weights and ids [1, top_k] -> x with what they add.

        w1, v1, w2: of all experts. Those that were not chosen are not read.
        """
        product, rows = self.product, self.product.ready(normed)
        w1, v1, w2 = (tuple(part[chosen[0]] for part in matrix) for matrix in (w1, v1, w2))
        gate, up = (product.times(rows, matrices, STREAMS // 2) for matrices in (w1, v1))  # in one loop
        hidden = kept(self.activation(gate) * up * weights.t())
        out = product.times(product.ready(hidden), w2).sum(0)
        return (x.flatten().float() + out).to(x.dtype).view_as(x)


class Head(nn.Module):
    """The product with the last matrix."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [1, 1, d_model] -> logits [1, 1, vocab] like x."""
        return times(self.product, x.flatten().float(), matrix).to(x.dtype)[None, None]


class Linear(nn.Module):
    """A matrix times many rows."""

    def __init__(self, many: Many) -> None:
        super().__init__()
        self.many = many

    def forward(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [n, inputs] -> [n, outputs] like x."""
        (out,) = self.many(x, (matrix,))
        return out.to(x.dtype)


class Expert(nn.Module):
    """What an expert computes for many rows."""

    def __init__(self, config: DbrxConfig, many: Many) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[str(config.ffn_config.activation)]
        self.top_k = config.ffn_config.moe_top_k
        self.many = many

    def forward(
        self, x: Tensor, weights: Tensor, places: Tensor, out: Tensor, w1: Matrix, v1: Matrix, w2: Matrix
    ) -> None:
        """x [n, d_model]; weights [n * top_k]: of the experts that each row has chosen; places [m]: where this one is.

        out [n * top_k, d_model]: what it adds, weighted, is written to those places.
        """
        gate, up = self.many(x[places // self.top_k], (w1, v1))
        (found,) = self.many(kept(self.activation(gate) * up), (w2,), inner=True)
        out.index_copy_(0, places, (found * weights[places][:, None]).to(out.dtype))


def times(product: Product, x: Tensor, matrix: Matrix) -> Tensor:
    """The row x [inputs] times one matrix: [outputs]."""
    return product.times(product.ready(x[None]), tuple(part[None] for part in matrix))[0]
