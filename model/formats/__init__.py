"""A choice: which files hold the weights, and under which names."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError
from ..model_files import ModelFiles
from ..weights import Weights


def open_weights(source: str | Path | ModelFiles) -> Weights:
    """Find out what `source` holds and check it; `ModelError` names the first file that is missing or damaged."""
    files = ModelFiles.of(source)
    path = files.path
    if path.is_file():
        if path.suffix in (".safetensors", ".json"):
            raise ModelError(f"{path}: is one file of a checkpoint", f"give its folder: -m {path.parent}")
        from .dbrx_gguf import GgufWeights

        return GgufWeights(path)
    try:
        return _open_folder(files)
    except ModelError:
        from .foreign import refusal

        if fault := refusal(files):  # what went wrong with files and names follows from this
            raise fault from None
        raise


def _open_folder(files: ModelFiles) -> Weights:
    from ..checkpoint import Checkpoint
    from .databricks import DatabricksWeights
    from .foreign import quantization_of
    from .quantized import METHOD, QuantizedWeights
    from .unfused import UnfusedWeights, is_unfused

    if quantization_of(files).get("quant_method") == METHOD:
        return QuantizedWeights(files)
    checkpoint = Checkpoint.open(files.path)
    if is_unfused(checkpoint.tensors):
        return UnfusedWeights(files, checkpoint)
    return DatabricksWeights(files, checkpoint)
