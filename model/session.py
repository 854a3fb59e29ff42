"""The conversation that was read last: its ids, and the logits behind some of them. Keys and values are the pool's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

from .kv_pool import KVPool
from .sampling import SamplingParams
from .saved_cache import Layout, SavedCache, load_cache, save_cache
from .sequence import Sequence

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM


class Session:
    """One timeline, so that the same prompt again is not read at all, and that it outlives the process.

    Decode a `sequence` of it, `keep` what that has made.
    """

    def __init__(self, network: DbrxForCausalLM, pool: KVPool) -> None:
        self.ids: list[int] = []
        self._network, self._pool = network, pool
        self._logits: Tensor | None = None  # [vocab] behind the first `_logits_at` ids
        self._logits_at = 0

    def sequence(self, prompt: list[int], params: SamplingParams, *, reply: list[int], **options: Any) -> Sequence:
        """A row for a prompt and what its reply has so far; see `Sequence` for the options."""
        same = [*prompt, *reply] == self.ids[: self._logits_at]
        return Sequence(prompt, params, reply=reply, logits=self._logits if same else None, **options)

    def keep(self, row: Sequence, known: list[int]) -> None:
        """Become the timeline of a row, as far as its ids are known."""
        self.ids, self._logits, self._logits_at = known, row.logits, row.logits_at

    def save(self, file: BinaryIO, made_by: Mapping[str, str]) -> None:
        """Write what the pool still has of it, with what it depends on: names -> values."""
        length, kv = self._pool.find(self.ids)
        logits = self._logits[None] if self._logits is not None and self._logits_at <= length else None
        save_cache(file, SavedCache(kv, self.ids[:length], self._logits_at, logits), made_by)

    def load(self, file: BinaryIO, size: int, made_by: Mapping[str, str]) -> None:
        """Become what `save` wrote into a file of `size` bytes; `UnusableState` names what differs from `made_by`."""
        kv, self.ids, self._logits_at, logits = load_cache(file, size, made_by, Layout.of(self._network))
        self._logits = None if logits is None else logits[0]
        self._pool.keep(kv, self.ids)
