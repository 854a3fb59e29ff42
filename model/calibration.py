"""What the inputs of experts are like on a text, layer by layer: only one expert is in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .attention import AttentionPlan, choose
from .checkpoint import EMBEDDING
from .formats.imatrix import ImportanceMatrix
from .kernels import ACTIVATIONS
from .packing import read_expert
from .quantization.equalize import quantize_expert
from .rope import rotary_table
from .transformer import DbrxBlock, Step
from .weights import FloatExpert, QuantizedExpert, QuantizedMatrix, Weights

TOKENS = 16384  # of a text that are read
SEQUENCE = 512  # tokens that see each other
AT_ONCE = 8  # sequences whose keys and values are in memory
FEWEST = 1024  # tokens that an expert is fitted to: one that fewer chose is fitted to all tokens of its layer

Quantize = Callable[[Tensor, Tensor], QuantizedMatrix]  # weights and the moments of their inputs (`affine.fit`)


class Calibration(Protocol):
    """Experts in few bits, fitted to what is known of their inputs."""

    digest: str  # of all that the numbers depend on

    def experts(self, layer: int, quantize: Quantize) -> Iterator[QuantizedExpert]:
        """A layer's experts, in order; layers are asked for in order, too, some maybe not at all."""


class Importance(Protocol):
    """How much errors of experts' weights count, by what is known of their inputs."""

    def squares(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Mean squares of the inputs of w1 and v1 [d_model], and of w2 [ffn_hidden_size]; asked for in order."""


class TextCalibration:
    """The text goes through the network as it is stored, a layer at a time, while the experts are quantized."""

    def __init__(self, weights: Weights, ids: Sequence[int]) -> None:
        """The last tokens, which fill no sequence, are left out; `ValueError` if there are less than two tokens."""
        if len(ids) < 2:
            raise ValueError("less than two tokens")
        self._weights = weights
        self._layer = 0
        length = min(SEQUENCE, len(ids))
        tokens = torch.tensor(ids[: min(len(ids), TOKENS) // length * length])
        self.digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        self._x = weights.read(EMBEDDING)[tokens].float().view(-1, length, weights.config.d_model)
        self._activation = ACTIVATIONS[str(weights.config.ffn_config.activation)]
        self._squares: list[tuple[Tensor, Tensor]] = []  # of the experts of the layer before

    @torch.inference_mode()
    def experts(self, layer: int, quantize: Quantize) -> Iterator[QuantizedExpert]:
        """See `Calibration`."""
        while self._layer < layer:  # those were quantized by an earlier run
            for _ in self._pass(fits=False):
                pass
        for floats, x, inner in self._pass(fits=True):
            yield quantize_expert(floats, quantize, (_products(x), _products(inner)))

    @torch.inference_mode()
    def squares(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """See `Importance`."""
        while self._layer <= layer:
            self._squares = [(_squares(x), _squares(inner)) for _, x, inner in self._pass(fits=True)]
        assert layer == self._layer - 1  # no layer comes again
        return self._squares[expert]

    def _pass(self, fits: bool) -> Iterator[tuple[FloatExpert, Tensor, Tensor]]:
        """Send the text through the next layer, in floats: experts, what w1 and v1 read, and what w2 reads.

        fits: of an expert that few tokens chose, what it would read of all.
        """
        normed, router_weights, chosen = self._attend()
        for expert in range(self._weights.config.ffn_config.moe_num_experts):
            w1, v1, w2 = floats = _floats(self._weights, self._layer, expert)
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            x = normed if fits and len(rows) < FEWEST else normed[rows]
            inner = self._activation(x @ w1.t()).mul_(x @ v1.t())
            yield floats, x, inner
            out = (inner if len(x) == len(rows) else inner[rows]) @ w2
            self._x.flatten(0, 1).index_add_(0, rows, out.mul_(router_weights[rows, place, None]))
        self._layer += 1

    def _attend(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first half of a block, on all tokens in a row: what experts read, the router's weights and choices."""
        block, config = self._block(), self._weights.config
        attend = choose("auto", self._x.device, self._x.dtype)[1]
        found = []
        for part in torch.split(self._x, AT_ONCE):
            plan = AttentionPlan([0] * len(part), part.shape[1], None, part.device)
            cos, sin = rotary_table(plan.positions, config.head_dim, config.attn_config.rope_theta)
            x, normed, _ = block.norm_attn_norm(part, cos, sin, Step(plan, attend, None, False, False, False))
            part.copy_(x)
            found.append((normed.flatten(0, 1), *block.ffn.router(normed.flatten(0, 1))[1:]))
        normed, router_weights, chosen = (torch.cat(each) for each in zip(*found, strict=True))
        return normed, router_weights, chosen

    def _block(self) -> DbrxBlock:
        """The next layer in float32, its experts left out."""
        prefix = f"transformer.blocks.{self._layer}."
        with torch.device("meta"):
            block = DbrxBlock(self._weights.config, self._layer)
        block.ffn.experts = nn.Identity()
        state = {name: self._weights.read(prefix + name, torch.float32) for name in block.state_dict()}
        block.load_state_dict(state, assign=True)
        return block


class ImatrixCalibration:
    """What llama-imatrix wrote: mean squares of inputs, without how they go together."""

    def __init__(self, weights: Weights, path: Path) -> None:
        """`ModelError` if it is not of this model."""
        self._weights = weights
        self._matrix = ImportanceMatrix(path, weights.config)
        self.digest = self._matrix.digest

    @torch.inference_mode()
    def experts(self, layer: int, quantize: Quantize) -> Iterator[QuantizedExpert]:
        """See `Calibration`."""
        for expert in range(self._weights.config.ffn_config.moe_num_experts):
            floats = _floats(self._weights, layer, expert)
            yield quantize_expert(floats, quantize, self._matrix.squares(layer, expert))


def _floats(weights: Weights, layer: int, expert: int) -> FloatExpert:
    """An expert in float32."""
    data = read_expert(weights, layer, expert)
    return FloatExpert(*(part.float() for part in weights.expert(layer, expert, data)))


def _squares(x: Tensor) -> Tensor:
    """Mean squares of columns [n, inputs]."""
    return x.square().mean(0)


def _products(x: Tensor) -> Tensor:
    """The means of x_i x_j over rows [n, inputs]: [inputs, inputs]."""
    return x.t() @ x / len(x)
