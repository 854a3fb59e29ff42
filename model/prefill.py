"""Way 4: read a prompt. Knows the network and the cache; no text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kv_cache import KVCache

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM


@torch.inference_mode()
def prefill(
    network: DbrxForCausalLM,
    input_ids: Tensor,
    cache: KVCache,
    attention_mask: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """Read input_ids [rows, seq] (padded on the left) into the cache; logits [rows, vocab] after the last column.

    What only the logits of the other columns would need is not computed, unless `whole` asks for it (to be watched).
    An interruption keeps the chunks that were finished.
    """
    columns = input_ids.shape[1]
    if columns == 0:
        raise ValueError("there is nothing to read: the prompt has no token")
    for start in range(0, columns, network.prefill_chunk):
        part = slice(start, min(start + network.prefill_chunk, columns))
        mask = None if attention_mask is None else attention_mask[:, part]
        out = network.transformer(input_ids[:, part], mask, past_key_values=cache, last_only=not whole)
    # Only the last position's logits are read: [seq, 100352] floats would fill the memory.
    logits: Tensor = network.lm_head(out.last_hidden_state[:, -1])
    return logits
