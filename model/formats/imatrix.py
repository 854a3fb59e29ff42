"""llama.cpp's importance matrices, in both forms: mean squares of what a matrix read on a text of its maker."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import MATRICES
from ..errors import ModelError
from ..safetensors_file import opened, pread, shown
from .dbrx_gguf import gguf_name
from .gguf_file import is_older_importance_matrix, open_gguf

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import DbrxConfig

MOST_BYTES = 2**30  # of the whole DBRX, 124 MB
OTHER = "give the one that was made of this model"
AGAIN = "copy it again, make it again with llama-imatrix, or give a text"
SUMS, COUNTS = ".in_sum2", ".counts"


def is_importance_matrix(path: Path) -> bool:
    """Whether a file, which may hold a text as well, is one; what is no file is none."""
    if not path.is_file():
        return False
    with opened(path, path.parent) as (fd, _):
        head = pread(fd, 24, 0)
    return head.startswith(b"GGUF") or is_older_importance_matrix(head)


class ImportanceMatrix:
    """Mean squares of the inputs of each expert's matrices; those of experts that no token met are their layer's."""

    def __init__(self, path: Path, config: DbrxConfig) -> None:
        """`ModelError` if the file is damaged, or was made of another model."""
        with opened(path, path.parent) as (fd, size):
            if size > MOST_BYTES:
                raise ModelError(f"{path}: has {size} bytes, more than any importance matrix")
            content = pread(fd, size, 0)
        self.digest = hashlib.sha256(content).hexdigest()
        experts, sizes = config.ffn_config.moe_num_experts, (config.d_model, config.ffn_config.ffn_hidden_size)
        found = _of_gguf(path, experts) if content.startswith(b"GGUF") else _of_dat(path, content, experts)
        if (beyond := gguf_name(f"transformer.blocks.{config.n_layers}.ffn.experts.mlp.w1")) in found:
            raise ModelError(f"{path}: has {beyond}, and this model {config.n_layers} layers", OTHER)
        self._squares: dict[tuple[int, str], Tensor] = {}
        for layer in range(config.n_layers):
            for matrix in MATRICES:
                name = gguf_name(f"transformer.blocks.{layer}.ffn.experts.mlp.{matrix}")
                squares, shape = found.get(name), (experts, sizes[matrix == "w2"])
                if squares is None or tuple(squares.shape) != shape:
                    what = f"lacks {name}" if squares is None else f"has {list(squares.shape)} numbers for {name}"
                    raise ModelError(f"{path}: {what}, where this model has {list(shape)}", OTHER)
                if not (bool((squares >= 0).all()) and bool(squares.sum().isfinite())):
                    what = f"has numbers for {name} that are no mean squares: negative, or not finite"
                    raise ModelError(f"{path}: {what}", AGAIN)
                self._squares[layer, matrix] = squares

    def squares(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Of the inputs of w1 and v1 [d_model], and of w2 [ffn_hidden_size]."""
        return self._squares[layer, "w1"][expert], self._squares[layer, "w2"][expert]


def _of_gguf(path: Path, experts: int) -> dict[str, Tensor]:
    """Name of a stack of experts -> mean squares [experts, inputs]."""
    import torch

    file = open_gguf(path)
    if file.values.get("general.type") != "imatrix":
        raise file.fault("is no importance matrix", "give a text, or what llama-imatrix wrote")
    found: dict[str, Tensor] = {}
    for name, sums in file.tensors.items():
        counts = file.tensors.get(name.removesuffix(SUMS) + COUNTS)
        if not name.endswith(SUMS) or counts is None or sums.dtype != "F32" or counts.dtype != "F32":
            continue
        total, seen = (
            torch.frombuffer(file.maps[info.file], dtype=torch.float32, count=info.nbytes // 4, offset=info.start)
            for info in (sums, counts)
        )
        if seen.numel() == experts and total.numel() % experts == 0:
            seen, total = seen[:, None], total.view(experts, -1)
            mean = total.sum(0) / seen.sum().clamp(min=1)
            found[name.removesuffix(SUMS)] = torch.where(seen > 0, total / seen.clamp(min=1), mean)
    return found


def _of_dat(path: Path, content: bytes, experts: int) -> dict[str, Tensor]:
    """The same of the older form: int32 entries; of each its name, calls, numbers; experts lie behind each other."""
    import torch

    found: dict[str, Tensor] = {}
    at = 4

    def number() -> int:
        nonlocal at
        (value,) = struct.unpack_from("<i", content, at)
        at += 4
        return int(value)

    try:
        for _ in range(struct.unpack_from("<i", content)[0]):
            length = number()
            name, at = content[at : at + length], at + max(length, 0)
            calls, count = number(), number()
            if length < 0 or calls < 0 or count < 0 or at + 4 * count > len(content):
                at_entry = f"at entry {shown(name.decode('latin1'))}"
                raise ModelError(f"{path}: is cut off, or no importance matrix, {at_entry}", AGAIN)
            values = torch.frombuffer(bytearray(content[at : at + 4 * count]), dtype=torch.float32) if count else None
            at += 4 * count
            if values is not None and count % experts == 0:
                found[name.decode("latin1")] = values.view(experts, -1) / max(1, calls)
    except struct.error:
        raise ModelError(f"{path}: is cut off, or no importance matrix", AGAIN) from None
    return found
