"""Tensor parallel: every rank holds a slice of each layer, started by torchrun (torch.distributed).

Attention is split by heads, each expert by its inner dimension, so a layer needs two sums over the ranks: one behind
`out_proj`, one behind the weighted sum of the experts (Megatron-LM, arXiv 1909.08053). Norms, router, embedding and
head are whole on every rank. Rank 0 leads: it samples, and tells the others before each step what to compute.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn

from .config import DbrxConfig
from .errors import InputError
from .experts import ResidentExperts
from .kv_cache import KVCache, KVRow
from .transformer import DbrxBlock, DbrxModel
from .weights import FloatExpert, QuantizedExpert, QuantizedMatrix, Weights, WrappedWeights

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

FEWER = "choose another number of ranks (torchrun --nproc-per-node)"
PATIENCE = timedelta(days=7)  # a follower waits for as long as a person thinks about the next question


class Step(NamedTuple):
    """What the leader is about to compute: ids [rows, seq], which of them count, and what its cache holds."""

    ids: Tensor
    valid: Tensor | None
    rows: list[int]  # a number for each row, the same one for as long as the leader has the row
    lengths: list[int]  # tokens of each that come before
    last_only: bool


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a model."""

    rank: int
    size: int
    local_rank: int

    def broadcast(self, message: Any = None) -> Any:
        """Rank 0's message, on every rank."""
        box = [message]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, the same to the bit on each."""
        total = x.float()  # the sum of halves would be rounded once a rank
        distributed.all_reduce(total)
        return total.to(x.dtype)

    def check(self, config: DbrxConfig) -> None:
        """`InputError` if the model does not divide by the number of ranks."""
        for what, count in (
            ("key and value heads", config.attn_config.kv_n_heads),
            ("the experts' inner dimension", config.ffn_config.ffn_hidden_size),
        ):
            if count % self.size:
                raise InputError(f"{what} of the model ({count}) do not divide by {self.size} ranks", FEWER)

    def shard(self, whole: int) -> slice:
        """This rank's share of so many things."""
        share = whole // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def lead(self, network: DbrxForCausalLM) -> None:
        """Tell the followers of every step of rank 0's network. Rows are appended to and trimmed, and share nothing.

        A row that is not in a step does not come again.
        """

        signature = inspect.signature(DbrxModel.forward)

        def announce(model: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = signature.bind(model, *positional, **named).arguments
            cache = given.get("past_key_values")
            if cache is None:
                raise ValueError("a network that is split over ranks needs a KVCache")
            last_only = given.get("last_only", False)
            rows = [id(row) for row in cache.rows]
            self.broadcast(Step(given["input_ids"], given.get("attention_mask"), rows, cache.lengths, last_only))

        network.transformer.register_forward_pre_hook(announce, with_kwargs=True)

    def part_ways(self) -> None:
        """The end: rank 0 has no more to tell."""
        if self.rank == 0:
            self.broadcast(None)
        distributed.barrier()  # who leaves early takes the connections from those who still listen
        distributed.destroy_process_group()

    def follow(self, network: DbrxForCausalLM) -> None:
        """Compute what the leader computes, until it says None."""
        held: dict[int, KVRow] = {}
        while (step := self.broadcast()) is not None:
            held = {number: held.get(number) or KVRow(network.config.n_layers) for number in step.rows}
            rows = [held[number] for number in step.rows]
            for row, length in zip(rows, step.lengths, strict=True):
                row.trim(min(row.length, length))  # of a row with several tokens the first one tells where it ends
            ahead = [length - row.length for row, length in zip(rows, step.lengths, strict=True)]
            cache = KVCache.of(rows, ahead)
            with torch.inference_mode():
                ids = step.ids.to(network.device)
                network.transformer(ids, step.valid, past_key_values=cache, last_only=step.last_only)


def join() -> Ranks | None:
    """Meet the other ranks of a torchrun; None in a process that runs alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return Ranks(distributed.get_rank(), distributed.get_world_size(), int(os.environ["LOCAL_RANK"]))


class ShardedWeights(WrappedWeights):
    """One rank's slices of other weights; see `Weights` for the methods. Of mapped files only the slices are read.

    Extents are those of whole experts: where a slice lies depends on the format.
    """

    def __init__(self, whole: Weights, ranks: Ranks) -> None:
        super().__init__(whole)
        self.ranks = ranks

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", owned: bool = False
    ) -> Tensor:
        tensor = self.whole.read(name)
        if ".attn." in name:
            tensor = self._of_attention(name, tensor)
        elif ".ffn.experts.mlp." in name:
            stacked = tensor.view(self.config.ffn_config.moe_num_experts, -1, tensor.shape[1])
            tensor = stacked[:, self.ranks.shard(stacked.shape[1])].flatten(0, 1)
        elif owned:
            tensor = tensor.clone()
        return tensor.to(device=device, dtype=dtype or tensor.dtype)

    def matrix(self, name: str, whole: QuantizedMatrix) -> QuantizedMatrix:
        """This rank's slice of a matrix of attention with a scale an output; of the head, all."""
        return QuantizedMatrix(*(self._of_attention(name, part) for part in whole[:2])) if ".attn." in name else whole

    def _of_attention(self, name: str, part: Tensor) -> Tensor:
        """Of a tensor [outputs, inputs], or of a number an output: Wqkv by heads of outputs, out_proj by inputs."""
        if name.endswith("attn.out_proj.weight"):
            return part[:, self.ranks.shard(part.shape[1])].contiguous() if part.dim() == 2 else part
        counts = [self.config.n_heads, *2 * [self.config.attn_config.kv_n_heads]]
        heads = torch.split(part.view(-1, self.config.head_dim, *part.shape[1:]), counts)
        return torch.cat([each[self.ranks.shard(len(each))].flatten(0, 1) for each in heads])

    def nbytes_of(self, name: str) -> int:
        sliced = ".attn." in name or ".ffn.experts.mlp." in name
        return self.whole.nbytes_of(name) // (self.ranks.size if sliced else 1)

    def expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> FloatExpert:
        whole = self.whole.expert(layer, expert, data)
        return FloatExpert(*(matrix[self.ranks.shard(len(matrix))] for matrix in whole))

    def expert_matrix(self, layer: int, expert: int, matrix: int) -> Tensor:
        return self.expert(layer, expert)[matrix]

    def quantized_expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> QuantizedExpert:
        stored = self.whole.quantized_expert(layer, expert, data)
        w1, v1, w2 = cast("QuantizedExpert", stored)  # blocks are not split over ranks
        rows = len(w1.values)
        if w2.zero is not None and rows % (self.ranks.size * (self.group or 1)):
            fault = f"experts of {rows} in groups of {self.group} do not divide by {self.ranks.size} ranks"
            raise InputError(fault, FEWER)
        hidden = self.ranks.shard(rows)
        return QuantizedExpert(_outputs(w1, hidden), _outputs(v1, hidden), _inputs(w2, self.ranks))


def _outputs(matrix: QuantizedMatrix, rows: slice) -> QuantizedMatrix:
    zero = None if matrix.zero is None else matrix.zero[rows]
    return QuantizedMatrix(matrix.values[rows], matrix.scale[rows], zero)


def _inputs(matrix: QuantizedMatrix, ranks: Ranks) -> QuantizedMatrix:
    """A share of the columns: of the values, and of the groups where scales belong to groups."""

    def columns(part: Tensor) -> Tensor:
        if part.dim() == 1:  # a scale an output
            return part
        return part[:, ranks.shard(part.shape[1])].contiguous()

    zero = None if matrix.zero is None else columns(matrix.zero)
    return QuantizedMatrix(columns(matrix.values), columns(matrix.scale), zero)


def localize(network: DbrxForCausalLM, ranks: Ranks) -> None:
    """Give a network on the meta device the shapes of one rank's slices, and the sums over ranks."""
    config = network.config
    ranks.check(config)

    def summed(_: nn.Module, __: Any, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return ranks.all_reduce(out[0]), out[1]

    for block in network.transformer.blocks:
        assert isinstance(block, DbrxBlock)
        attention, experts = block.norm_attn_norm.attn, block.ffn.experts
        attention.heads = [count // ranks.size for count in attention.heads]
        attention.Wqkv = _linear(attention.Wqkv, config.d_model, sum(attention.heads) * config.head_dim)
        attention.out_proj = _linear(attention.out_proj, attention.heads[0] * config.head_dim, config.d_model)
        assert isinstance(experts, ResidentExperts)
        for name, matrix in experts.mlp.named_parameters():
            setattr(experts.mlp, name, nn.Parameter(matrix.new_empty(len(matrix) // ranks.size, config.d_model)))
        attention.register_forward_hook(summed)
        block.ffn.register_forward_hook(summed)


def _linear(like: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device=like.weight.device, dtype=like.weight.dtype)
