"""A choice: which files hold the weights, and under which names."""

from __future__ import annotations

from pathlib import Path

from .weights import Extent, FloatExpert, Weights

__all__ = ["Extent", "FloatExpert", "Weights", "open_weights"]


def open_weights(path: str | Path) -> Weights:
    """Find out what `path` holds and check it; `ModelError` names the first file that is missing or damaged."""
    from .databricks import DatabricksWeights

    return DatabricksWeights(Path(path))
