"""`DbrxForCausalLM.generate`: tensors in, tensors out, with the arguments that people know from transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import ContextError
from .generation_config import GenerationConfig, as_ids
from .kv_cache import KVCache
from .kv_pool import KVPool
from .prefill import prefill
from .sampling import DISTRIBUTION, SamplingParams
from .scheduler import Scheduler
from .sequence import LogitsMask, Sequence, Stopper

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM


def generate(
    network: DbrxForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    past_key_values: KVCache | None = None,
    use_cache: bool = True,
    stopping: Stopper | None = None,
    logits_mask: LogitsMask | None = None,
    seed: int | None = None,
    **sampling: Any,
) -> Tensor:
    """Continue input_ids [batch, seq], padded on the left where attention_mask is 0; returns [batch, seq + new].

    Without attention_mask, every id of the prompt that equals `pad_token_id` is taken for padding and not read, as in
    transformers, unless it is also an end id: pass a mask where that id may stand for a token.

    Greedy unless `do_sample` is true here or in the checkpoint's generation_config.json. At most `max_new_tokens`
    new ones, or up to `max_length` in all; 1024 if neither is given, and never more than the context. A row ends at
    one of `eos_token_id` (default: the checkpoint's) or when `stopping(row, new_ids)` is true, and is filled with
    `pad_token_id`. `past_key_values` holds, row by row, what an earlier call read of the front of input_ids, without
    its padding. Sampling: temperature, top_p, top_k, min_p, repetition_penalty, frequency_penalty, presence_penalty,
    seed.
    """
    unknown = sorted(set(sampling) - set(DISTRIBUTION))
    if unknown:
        raise TypeError(f"generate() has no argument {unknown[0]!r}; sampling is set by {', '.join(DISTRIBUTION)}")
    if not use_cache:
        raise ValueError("generate() always keeps keys and values; use_cache=False has no use here")
    config = network.generation_config or GenerationConfig()
    rows, seq = input_ids.shape
    room = network.config.max_seq_len
    if seq >= room:
        raise ContextError(f"the prompt has {seq} tokens, and the model's context is {room}", "shorten the prompt")
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < network.config.vocab_size:
        raise ValueError(f"input_ids holds ids that are none of the network's {network.config.vocab_size}")
    wanted = max_new_tokens if max_new_tokens is not None else (max_length - seq if max_length is not None else None)
    if wanted is not None and wanted < 1:
        bound = f"max_length {max_length}" if max_new_tokens is None else f"max_new_tokens {max_new_tokens}"
        raise ValueError(f"{bound} leaves no room behind a prompt of {seq} tokens")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask {[*attention_mask.shape]} is not of the shape of input_ids {[rows, seq]}")
    if attention_mask is not None and not attention_mask[:, -1:].all():
        raise ValueError("attention_mask has padding behind a prompt: pad on the left")

    asked = sampling | {"max_tokens": wanted, "seed": seed}
    asked = {key: value for key, value in asked.items() if value is not None}
    if do_sample is not None:
        config = replace(config, do_sample=do_sample)
    if not config.do_sample:
        asked["temperature"] = 0.0
    defaults = config.sampling(SamplingParams(temperature=1.0, top_p=1.0))
    params = defaults.under(**asked)
    params = replace(params, max_tokens=min(params.max_tokens, room - seq))
    eos_ids = config.eos_token_id if eos_token_id is None else as_ids(eos_token_id)
    named = config.pad_token_id if pad_token_id is None else pad_token_id
    pad = next((i for i in (named, *eos_ids) if i is not None), 0)

    input_ids = input_ids.to(network.device)
    if attention_mask is None:
        # As transformers has it: ids equal to the id of padding are padding, unless it also ends a reply.
        attention_mask = input_ids.ne(pad) if named is not None and named not in eos_ids else torch.ones_like(input_ids)
    keep = attention_mask.to(network.device).bool()
    cache = past_key_values if past_key_values is not None else KVCache(network.config.n_layers, rows)
    if len(cache.rows) != rows:
        raise ValueError(f"past_key_values has {len(cache.rows)} rows, the input {rows}")
    known, given = keep.new_tensor(cache.lengths, dtype=torch.long), keep.cumsum(1)
    if (known >= given[:, -1]).any():
        lengths = f"rows of {cache.lengths} tokens, the input of {given[:, -1].tolist()}"
        raise ValueError(f"past_key_values has {lengths}: no front of it")
    logits: list[Tensor | None] = [None] * rows
    if not keep[:, -1].all():
        # As in transformers the first new ids are read off padding at the end, which no row holds.
        logits = list(prefill(network, input_ids, cache, keep & (given > known[:, None])))
    generator = torch.Generator(network.device).manual_seed(seed) if seed is not None else None
    scheduler = Scheduler(network, rows, KVPool(network, block_tokens=cache.block_tokens))
    sequences = [
        Sequence(
            ids[kept].tolist(),
            params,
            kv=cache.rows[number],
            logits=logits[number],
            number=number,
            eos_ids=eos_ids,
            stopper=stopping,
            mask=logits_mask,
            generator=generator,
        )
        for number, (ids, kept) in enumerate(zip(input_ids, keep, strict=True))
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    while len(scheduler):
        scheduler.step()
        for sequence in sequences:
            if sequence.fault is not None:
                raise sequence.fault
    new = [torch.tensor(sequence.ids) for sequence in sequences]
    return torch.cat((input_ids, pad_sequence(new, True, pad).to(network.device)), dim=1)
