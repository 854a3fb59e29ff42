"""What a model lies in: a checkpoint's folder, or a GGUF file. Its config.json is read once, for all that ask."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import DbrxConfig
from .safetensors_file import read_json

if TYPE_CHECKING:
    from .formats.ollama import Manifest


class ModelFiles:
    """A folder or a GGUF file, handed to all that read of it: network, tokenizer and generation settings.

    manifest: what else is said of a GGUF file in ollama's store.
    """

    def __init__(self, path: str | Path, manifest: Manifest | None = None) -> None:
        self.path = Path(path)
        self.manifest = manifest

    @classmethod
    def of(cls, source: str | Path | ModelFiles) -> ModelFiles:
        """What is given, if it is one already."""
        return source if isinstance(source, ModelFiles) else cls(source)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json, parsed; empty where there is none. `ModelError` names the file if it is damaged."""
        path = self.path / "config.json"
        return read_json(path) if os.path.lexists(path) else {}

    @cached_property
    def config(self) -> DbrxConfig:
        """Of a folder; `ModelError` where config.json is missing or not DBRX's."""
        return DbrxConfig.from_json(self.path / "config.json", self.settings or None)
