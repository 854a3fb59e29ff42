"""Way 4: read the prompt, then one token after the other. Knows the network, the cache and the sampler; no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .errors import ModelError
from .kv_cache import KVCache
from .sampling import SamplingParams, penalize, sample
from .transformer import DbrxForCausalLM

PREFILL_CHUNK = 512  # tokens a step: large enough for full matrix speed, small enough for Ctrl-C and memory


class Stopper(Protocol):
    """Says after each token whether its row is complete."""

    def __call__(self, row: int, ids: Sequence[int]) -> bool:
        """ids: all that the row's reply has so far, the newest last."""


class LogitsMask(Protocol):
    """Forbids tokens, for constrained decoding."""

    def __call__(self, row: int, ids: Sequence[int], logits: Tensor) -> Tensor:
        """logits [vocab] -> the same with -inf where a token may not come next."""


@torch.inference_mode()
def prefill(
    network: DbrxForCausalLM,
    input_ids: Tensor,
    cache: KVCache,
    attention_mask: Tensor | None = None,
    on_chunk: Callable[[int], None] | None = None,
    chunk: int = PREFILL_CHUNK,
) -> Tensor:
    """Read input_ids [rows, seq] (padded on the left) into the cache; logits [rows, vocab] after the last column.

    `on_chunk` hears how many columns were read. An interruption keeps the chunks that were finished.
    """
    columns = input_ids.shape[1]
    if columns == 0:
        raise ValueError("there is nothing to read: the prompt has no token")
    for start in range(0, columns, chunk):
        part = slice(start, min(start + chunk, columns))
        mask = None if attention_mask is None else attention_mask[:, part]
        hidden = network.transformer(input_ids[:, part], mask, past_key_values=cache).last_hidden_state
        if on_chunk:
            on_chunk(part.stop - start)
    # Only the last position's logits are read: [seq, 100352] floats would fill the memory.
    logits: Tensor = network.lm_head(hidden[:, -1])
    return logits


@torch.inference_mode()
def decode(
    network: DbrxForCausalLM,
    prompts: Sequence[Sequence[int]],
    logits: Tensor,
    cache: KVCache,
    params: SamplingParams,
    *,
    eos_ids: Sequence[int] = (),
    stopper: Stopper | None = None,
    mask: LogitsMask | None = None,
    generator: torch.Generator | None = None,
    max_context: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next id of each row, None for a row that is complete, until all are.

    prompts: the ids that were read, for the penalties; logits [rows, vocab] as `prefill` gave them. A row ends with
    one of `eos_ids` (which is yielded), when `stopper` says so, after `max_tokens`, or at `max_context` tokens.
    A token is read into the cache only when the one after it is asked for.
    """
    rows = [_Row(prompt, logits.shape[-1], params, logits.device) for prompt in prompts]
    room = max_context or network.config.max_seq_len
    ends = frozenset(eos_ids)
    while True:
        new: list[int | None] = []
        for i, row in enumerate(rows):
            if row.done:
                new.append(None)
                continue
            scores = row.penalize(logits[i].float())
            if mask is not None:
                scores = mask(i, row.ids, scores)
            token = sample(_finite(scores), params, generator)
            row.add(token)
            full = len(row.ids) >= params.max_tokens or row.prompt_length + len(row.ids) >= room
            row.done = token in ends or full or (stopper is not None and stopper(i, row.ids))
            new.append(token)
        yield new
        if all(row.done for row in rows):
            return
        # A row that is complete is fed its last token again: nothing of it is read any more.
        column = torch.tensor([[row.ids[-1]] for row in rows], device=logits.device)
        logits = network(column, past_key_values=cache).logits[:, -1]


class _Row:
    """One sequence as it is made."""

    def __init__(self, prompt: Sequence[int], vocab: int, params: SamplingParams, device: torch.device) -> None:
        self.ids: list[int] = []
        self.prompt_length = len(prompt)
        self.done = False
        self.params = params
        self.penalized = params.repetition_penalty != 1 or bool(params.frequency_penalty or params.presence_penalty)
        if self.penalized:
            self.counts = torch.zeros(vocab, device=device)
            self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, dtype=torch.long, device=device)] = True

    def add(self, token: int) -> None:
        self.ids.append(token)
        if self.penalized:
            self.counts[token] += 1
            self.seen[token] = True

    def penalize(self, logits: Tensor) -> Tensor:
        return penalize(logits, self.seen, self.counts, self.params) if self.penalized else logits


def _finite(logits: Tensor) -> Tensor:
    """Refuse numbers that no sound network makes; -inf is a mask's."""
    if bool(logits.isnan().any()) or bool(logits.max().isinf()):
        raise ModelError(
            "the model computed numbers that are not finite: its weights are damaged, or overflow in this dtype",
            "check the files with `dbrx download MODEL --verify`, or try --dtype float32",
        )
    return logits
