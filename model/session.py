"""One timeline of ids with its keys and values, and the logits that the network gave last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

from .kv_cache import KVRow
from .sampling import SamplingParams
from .saved_cache import Layout, SavedCache, load_cache, save_cache
from .sequence import Sequence, common_prefix

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM


class Session:
    """What was read of a conversation, so that the next turn reads only what is new.

    `sync` to the ids of the turn, decode a `sequence` of it, `keep` what that has read.
    """

    def __init__(self, network: DbrxForCausalLM) -> None:
        self._network = network
        self.ids: list[int] = []  # whose keys and values `kv` holds
        self.kv = KVRow(network.config.n_layers)
        self._logits: Tensor | None = None  # [vocab] behind `_logits_at` ids: the same prompt is not read at all
        self._logits_at = 0

    def sync(self, ids: list[int]) -> int:
        """Forget all behind what this timeline has in common with `ids`; returns how many of these need not be read.

        It is all of them only where the logits behind the last one are known.
        """
        kept = common_prefix(ids, self.ids)
        if self._logits is None or not kept == len(ids) == self._logits_at:
            kept = min(kept, len(ids) - 1)
            self._logits = None
        self.ids = ids[:kept]
        self.kv.trim(kept)
        return kept

    def sequence(self, prompt: list[int], params: SamplingParams, **options: Any) -> Sequence:
        """A row that goes on from what was synced, its prompt and `reply`; see `Sequence` for the options."""
        return Sequence(prompt, params, kv=self.kv, logits=self._logits, **options)

    def keep(self, row: Sequence, known: list[int]) -> None:
        """Remember what a row has read of the ids that are known of it, which an interrupt may have made fewer."""
        self.kv.trim(min(self.kv.length, len(known)))
        self.ids = known[: self.kv.length]
        self._logits, self._logits_at = row.logits, row.logits_at

    def adopt(self, kv: KVRow, ids: list[int]) -> None:
        """Become another timeline, of which `kv` holds the first ids."""
        self.kv, self.ids, self._logits = kv, ids[: kv.length], None

    def fork(self, ids: list[int]) -> Session:
        """Another session with what this one has in common with `ids`, without copying it."""
        new = Session(self._network)
        new.ids = ids[: common_prefix(ids, self.ids)]
        new.kv.take(self.kv, len(new.ids))
        return new

    def save(self, file: BinaryIO, made_by: Mapping[str, str]) -> None:
        """Write all of it with what it depends on: names -> values."""
        logits = self._logits if self._logits is not None and self._logits_at <= len(self.ids) else None
        saved = SavedCache(self.kv, self.ids, self._logits_at, None if logits is None else logits[None])
        save_cache(file, saved, made_by)

    def load(self, file: BinaryIO, size: int, made_by: Mapping[str, str]) -> None:
        """Become what `save` wrote into a file of `size` bytes; `UnusableState` names what differs from `made_by`."""
        self.kv, self.ids, self._logits_at, logits = load_cache(file, size, made_by, Layout.of(self._network))
        self._logits = None if logits is None else logits[0]
