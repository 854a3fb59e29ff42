"""Which weights are to blame where numbers are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import NotFiniteError

SEARCH_S = 10.0


@contextmanager
def damage_named(source: Path | None) -> Iterator[None]:
    """A `NotFiniteError` inside names the tensor and the file, if one is found soon."""
    try:
        yield
    except NotFiniteError:
        if source is None:
            raise
        from model.checkpoint import Checkpoint
        from model.formats.dbrx_gguf import GgufWeights
        from model.safetensors_file import damaged, shown

        with Checkpoint.open(source) if source.is_dir() else GgufWeights(source) as weights:
            info = weights.first_not_finite(SEARCH_S)
        if info is None:
            raise
        raise damaged(info.file, f"{shown(info.name)} holds numbers that are not finite") from None
