"""ggml's types -> floats: rows of bytes dequantized piece by piece, on several threads, straight to their place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf.constants import GGML_QUANT_SIZES
from torch import Tensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 2**17  # numbers dequantized at once: they stay in the cache of the core that works on them


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of `columns` numbers."""
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(columns // block * nbytes)


def can_read(kind: str) -> bool:
    """Whether the gguf package can dequantize a type."""
    if kind in FLOATS:
        return True
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, row_bytes(kind, 256)), np.uint8), GGMLQuantizationType[kind])
    except (NotImplementedError, ValueError):
        return False
    return True


def fill(out: Tensor, raw: Tensor, kind: str) -> None:
    """Write the rows in `raw` (uint8, any type's bytes) to `out` [rows, columns] on the CPU, in the dtype of `out`."""
    rows, columns = out.shape
    if kind in FLOATS:
        out.copy_(raw.view(FLOATS[kind]).view(rows, columns))
        return
    data = raw.view(rows, -1).numpy()
    quantization = GGMLQuantizationType[kind]
    inference = torch.is_inference_mode_enabled()  # of this thread only

    def piece(start: int) -> None:
        with np.errstate(all="ignore"):  # a scale may be infinite: what it makes is told when logits are computed
            values = dequantize(data[start : start + step], quantization)
        with torch.inference_mode(inference):
            out[start : start + step].copy_(torch.from_numpy(values))

    step = max(1, PIECE // columns)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(piece, range(0, rows, step)))
