"""What compiled functions depend on: networks of the same form share them."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import DbrxConfig

Matrices = Literal["floats", "bytes", "words", "nibbles"]


@dataclass(frozen=True)
class Form:
    """A network's shapes and types. dtype: of activations and float weights; experts: None where others compute.

    group: of nibbles.
    """

    config: DbrxConfig
    dtype: str
    dense: Matrices
    experts: Matrices | None
    group: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Form:
        return cls(**values | {"config": DbrxConfig.from_dict(values["config"])})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"config": self.config.to_dict()}

    @property
    def key(self) -> str:
        """A name for what is compiled from this form here: by this version of PyTorch, for this processor."""
        facts = json.dumps([self.to_dict(), torch.__version__, _processor()])
        here = Path(__file__).parent
        sources = [(here / name).read_bytes() for name in ("products.py", "functions.py", "build.py")]
        return hashlib.sha256(b"\0".join((facts.encode(), *sources))).hexdigest()[:32]


def _processor() -> str:
    """What the compiler makes use of."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
