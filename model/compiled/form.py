"""What compiled functions depend on: networks of the same form share them, and of those that differ, a part."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import DbrxConfig

# Of what is compiled, layouts and constants included: changed, they are compiled again.
SOURCES = (
    *("build.py", "functions.py", "many.py", "products.py", "tiles.py"),
    *("../quantization/blocks.py", "../quantization/floats.py", "../quantization/int8.py", "../quantization/int4.py"),
    *("../quantization/nibbles.py", "../moe.py", "../rope.py"),
)
Matrices = Literal["floats", "blocks", "bytes", "widened", "nibbles"]


@dataclass(frozen=True)
class Form:
    """Shapes and types. dtype: of activations and float weights; group: of nibbles.

    dense: how the matrices of attention and head are held; experts: how those of the experts. None leaves them out.
    """

    config: DbrxConfig
    dtype: str
    dense: Matrices | None
    experts: Matrices | None
    group: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Form:
        return cls(**values | {"config": DbrxConfig.from_dict(values["config"])})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"config": self.config.to_dict()}

    def parts(self) -> list[Form]:
        """Attention and head, and the experts: networks that share only one of them share what is compiled for it."""
        dense, experts = replace(self, experts=None, group=0), replace(self, dense=None)
        return [part for part in (dense, experts) if part.dense or part.experts]

    @property
    def key(self) -> str:
        """A name for what is compiled from this form here: by this version of PyTorch, for this processor."""
        facts = json.dumps([self.to_dict(), torch.__version__, _processor()])
        sources = [(Path(__file__).parent / name).read_bytes() for name in SOURCES]
        return hashlib.sha256(b"\0".join((facts.encode(), *sources))).hexdigest()[:32]


def _processor() -> str:
    """What the compiler makes use of."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
