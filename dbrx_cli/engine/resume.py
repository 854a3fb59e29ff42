"""`--resume FILE`: a reply on disk as it comes, so that a killed run goes on where it stopped, to the same text.

The file only grows. Its first block says what is being answered, and by what; each later one adds the keys and values
of some tokens, ids of the reply, and the random generator as it was after them. A block that the kill cut off fails
its checksum, and is written again.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from dbrx_cli.engine import FinishReason, Likelihood, TokenLogprob
from dbrx_cli.engine.reply import Reply
from dbrx_cli.engine.saved import faults, refuse_foreign
from dbrx_cli.private import open_private
from model.errors import InputError
from model.kv_cache import KVRow
from model.saved_cache import (
    Block,
    Layout,
    UnusableState,
    cache_tensors,
    extend_row,
    read_block,
    require_same,
    write_block,
)

EVERY = 0.2  # seconds between two blocks at least,
SHARE = 0.05  # and so many that writing takes no more than this share of the time


class _Progress(NamedTuple):
    """How far a reply is: this many of its ids, with this many tokens in the cache, and the generator after them."""

    reply: Reply
    ids: int
    kv: KVRow
    tokens: int
    generator: Tensor | None


class Journal:
    """One reply in its file: what an earlier process left of it, and what this one adds. A context manager."""

    def __init__(
        self, path: Path, request: Mapping[str, str], seed: int, layout: Layout, notice: Callable[[str], None]
    ) -> None:
        """request: all that decides about the text, names -> values. `InputError` if the file is of another one.

        `notice` hears when nothing more can be written: the reply goes on without.
        """
        self.path = path
        self.seed = seed
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.generator: Tensor | None = None
        self.finished: FinishReason | None = None
        self.kv = KVRow(len(layout.devices))
        self._layout = layout
        self._notice = notice
        self._failed = False
        self._new: _Progress | None = None  # not in the file yet
        self._due = time.monotonic() + EVERY
        self._end = 0  # where the last good block ends
        refuse_foreign(path)
        with faults(path):
            self._file = self._locked()
            try:
                self._open(request)
            except BaseException:
                self._file.close()
                raise
        self._written = (len(self.ids), self.kv.length)  # ids, and tokens whose keys and values the file holds

    def _locked(self) -> BinaryIO:
        file = os.fdopen(open_private(self.path), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"{self.path} is in use by another run", "wait for it, or name another file") from None
        return file

    def _open(self, request: Mapping[str, str]) -> None:
        with suppress(UnusableState):  # what lies before it is whole
            self._replay(request)
        if self._end == 0:
            if os.fstat(self._file.fileno()).st_size:
                self._set_aside()
            self._append({"made_by": json.dumps(dict(request)), "seed": str(self.seed)}, {})

    def _set_aside(self) -> None:
        """Keep what cannot be read: it is not known what it is worth."""
        names = (self.path.with_name(f"{self.path.name}.damaged-{n}") for n in count(1))
        kept = next(path for path in names if not path.exists() and not path.is_symlink())
        os.rename(self.path, kept)
        self._file.close()
        self._file = self._locked()
        self._notice(f"the beginning of {self.path} is damaged: it is kept as {kept.name}, and the reply begins anew")

    def _replay(self, request: Mapping[str, str]) -> None:
        size = os.fstat(self._file.fileno()).st_size
        while block := read_block(self._file, size - self._end):
            if self._end == 0:
                self._check(block, request)
            else:
                self._take(block)
            self._end = self._file.tell()

    def _check(self, first: Block, request: Mapping[str, str]) -> None:
        try:
            require_same(first.metadata, request)
        except UnusableState as error:
            fault = f"{self.path} is of another run: it {error.message}"
            raise InputError(fault, "remove it, or name another file") from None
        self.seed = int(first.metadata["seed"])

    def _take(self, block: Block) -> None:
        tensors = block.tensors
        ids, generator = tensors.pop("ids").tolist(), tensors.pop("generator", self.generator)
        if tensors:
            extend_row(self.kv, tensors, len(tensors["k.0"]), self._layout)
        self.ids += ids
        self.generator = generator
        self.logprobs += [_logprob(values) for values in json.loads(block.metadata["logprobs"])]
        self.finished = cast("FinishReason | None", block.metadata.get("finished"))

    def note(self, reply: Reply, kv: KVRow, generator: Tensor | None) -> None:
        """Hear that a chunk of the prompt was read, or that the reply has a token more. Writes if it is time.

        generator: its state after the newest token, None before the first.
        """
        # The newest token is left to be read, alone: the run that goes on takes the very steps of one that never ended.
        tokens = min(kv.length, len(reply.prompt) + len(reply.ids) - 1)
        self._new = _Progress(reply, len(reply.ids), kv, tokens, generator)
        start = time.monotonic()
        if start >= self._due:
            self._write()
            now = time.monotonic()
            self._due = now + max(EVERY, (now - start) / SHARE)

    def finish(self, reason: FinishReason) -> None:
        """The reply is whole."""
        self._write(reason)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._write()
        finally:
            with suppress(OSError):  # a full disk was told already
                self._file.close()

    def _write(self, finished: FinishReason | None = None) -> None:
        """Add what is new since the last block, and how the reply ended."""
        new = self._new
        if self._failed or (new is None and finished is None):
            return
        metadata, tensors = {"logprobs": "[]"}, {"ids": torch.tensor([], dtype=torch.long)}
        if new is not None:
            ids, tokens = self._written
            if new.tokens > tokens:
                tensors |= cache_tensors(new.kv, tokens, new.tokens)
            if new.generator is not None:
                tensors["generator"] = new.generator
            tensors["ids"] = torch.tensor(new.reply.ids[ids : new.ids], dtype=torch.long)
            metadata["logprobs"] = json.dumps([asdict(each) for each in new.reply.logprobs[ids : new.ids]])
        self._append(metadata | ({"finished": finished} if finished else {}), tensors)
        if new is not None:
            self._written, self._new = (new.ids, max(tokens, new.tokens)), None

    def _append(self, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        try:
            self._file.seek(self._end)
            self._file.truncate()
            write_block(self._file, metadata, tensors)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._failed = True
            self._notice(f"{self.path} cannot be written: {error.strerror}; the reply goes on without")
            return
        self._end = self._file.tell()


def _logprob(values: dict[str, Any]) -> TokenLogprob:
    return TokenLogprob(**{**values, "top": [Likelihood(**each) for each in values["top"]]})
