"""GGUF files of DBRX, as llama.cpp makes them: single or split, in any type that can be dequantized."""

from __future__ import annotations

import mmap
from collections import Counter
from math import prod
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NoReturn

from ..checkpoint import EMBEDDING, MATRICES, expected_tensors, listed
from ..config import DbrxConfig
from ..placement import Format
from ..quantization import BLOCKS, GGUF, is_finite
from ..safetensors_file import TensorInfo, damaged, give_back
from ..weights import BlockMatrix, Extent, FloatExpert, KeptExpert, kept_format
from .gguf_file import OTHER_TYPE, open_gguf

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Databricks' names -> llama.cpp's.
OUTSIDE = {
    EMBEDDING: "token_embd.weight",
    "transformer.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK = {
    "norm_attn_norm.norm_1.weight": "attn_norm.weight",
    "norm_attn_norm.norm_2.weight": "attn_output_norm.weight",
    "norm_attn_norm.attn.Wqkv.weight": "attn_qkv.weight",
    "norm_attn_norm.attn.out_proj.weight": "attn_output.weight",
    "ffn.router.layer.weight": "ffn_gate_inp.weight",
    "ffn.experts.mlp.w1": "ffn_gate_exps.weight",
    "ffn.experts.mlp.v1": "ffn_up_exps.weight",
    "ffn.experts.mlp.w2": "ffn_down_exps.weight",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{BLOCK[rest]}"


class GgufWeights:
    """A DBRX model in GGUF; see `Weights` for the methods.

    Quantized tensors come in bfloat16 from `read` unless it is told otherwise, quantized experts in float32 from
    `expert`: exact, whatever they are cast to. `KeptWeights` gives both as they are stored.
    """

    quantization = "none"  # to the experts' kernels: what they are given are floats
    group: int | None = None
    plain_experts = False

    def __init__(self, path: Path) -> None:
        self._file = open_gguf(path)
        self.source = self._file.path
        self.config = DbrxConfig.from_gguf(self._file)
        self._maps = dict(self._file.maps)
        self._check()

    def _check(self) -> None:
        """Exactly the tensors of this configuration, in shapes and types that can be read."""
        from .dequantize import can_read

        found = self._file.tensors
        if self.config.n_layers > len(found):  # before a table of that length is made
            raise self._file.fault(f"holds {len(found)} tensors, too few for {self.config.n_layers} layers")
        self._shapes = expected_tensors(self.config)
        shapes = {gguf_name(name): self._stored_shape(name, shape) for name, shape in self._shapes.items()}
        missing, unexpected = [n for n in shapes if n not in found], sorted(found.keys() - shapes.keys())
        if missing:
            raise self._file.fault(f"{listed(missing, 'is', 'are')} missing", "take another conversion of the model")
        if unexpected:
            file = found[unexpected[0]].file
            raise self._file.fault(f"{listed(unexpected, 'does', 'do')} not belong to DBRX", f"they are in {file}")
        for name, shape in shapes.items():
            if found[name].shape != shape:
                raise damaged(
                    found[name].file,
                    f"{name} has shape {list(found[name].shape)}, the header's values ask for {list(shape)}",
                )
        for kind in sorted({info.dtype for info in found.values()}):
            if not can_read(kind):
                raise self._file.fault(f"has tensors of the type {kind}, which cannot be read", OTHER_TYPE)

    def _stored_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file: experts on a dimension of their own, w2 transposed."""
        if ".experts." not in name:
            return shape
        ffn = self.config.ffn_config
        hidden, d = ffn.ffn_hidden_size, self.config.d_model
        return (ffn.moe_num_experts, d, hidden) if name.endswith(".w2") else (ffn.moe_num_experts, hidden, d)

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", owned: bool = False
    ) -> Tensor:
        import torch

        from .dequantize import FLOATS, fill

        info = self._file.tensors[gguf_name(name)]
        stored = FLOATS.get(info.dtype)
        dtype = dtype or stored or torch.bfloat16
        shape = self._shapes[name]
        transposed = name.endswith(".w2")
        if stored == dtype and not transposed:
            mapped = self._raw(info).view(stored).view(shape)
            return mapped.to(device) if not owned else mapped.to(device, copy=True)
        out = torch.empty(shape, dtype=dtype)
        stack = len(info.shape) == 3
        for expert, part in enumerate(out.chunk(info.shape[0]) if stack else [out.view(-1, shape[-1])]):
            fill(part.t() if transposed else part, self._raw(info, expert if stack else None), info.dtype)
            self._forget(info, expert if stack else None)
        return out.to(device)

    def first_not_finite(self, seconds: float) -> TensorInfo | None:
        """A tensor that holds NaN or an infinity, if one is found in this time."""
        import torch

        from .dequantize import fill

        end = monotonic() + seconds
        for info in self._file.tensors.values():
            stack = range(info.shape[0]) if len(info.shape) == 3 else (None,)
            part = torch.empty(info.shape[-2:]).view(-1, info.shape[-1])
            for expert in stack:
                if monotonic() > end:
                    return None
                fill(part, self._raw(info, expert), info.dtype)
                self._forget(info, expert)
                if not is_finite(part):
                    return info
        return None

    @property
    def kept(self) -> Format | None:
        """Bytes a weight as kernels hold them that compute in the file's blocks; None if an expert's have no kernel."""
        kinds: Counter[str] = Counter()
        for info in (info for layer in range(self.config.n_layers) for info in self._experts(layer)):
            if info.dtype not in BLOCKS:
                return None
            kinds[info.dtype] += info.nbytes
        return kept_format(kinds.most_common(1)[0][0], GGUF, self._shapes, self._kept_bytes)

    def _kept_bytes(self, name: str) -> int:
        """Of a matrix as kernels hold it: what is in no blocks as `read_exactly` gives it."""
        info = self._file.tensors[gguf_name(name)]
        return info.nbytes if info.dtype in BLOCKS else prod(info.shape) * (2 if info.dtype == "BF16" else 4)

    def read_exactly(self, name: str) -> Tensor:
        """A tensor in bfloat16 if the file has it so, else in float32."""
        import torch

        bf16 = self._file.tensors[gguf_name(name)].dtype == "BF16"
        return self.read(name, torch.bfloat16 if bf16 else torch.float32)

    def kept_matrix(self, name: str) -> BlockMatrix | None:
        """A matrix of attention, the head or the embedding as it is stored, mapped; None if it is in no blocks."""
        info = self._file.tensors[gguf_name(name)]
        if info.dtype not in BLOCKS:
            return None
        return BlockMatrix(self._raw(info).view(info.shape[0], -1), info.dtype)

    def kept_expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> KeptExpert:
        """One expert as it is stored, where `kept` tells sizes; `data` as in `expert`."""
        infos = self._experts(layer)
        raws = data or tuple(self._raw(info, expert) for info in infos)
        return KeptExpert(
            *(BlockMatrix(raw.view(info.shape[1], -1), info.dtype) for info, raw in zip(infos, raws, strict=True))
        )

    def _raw(self, info: TensorInfo, expert: int | None = None) -> Tensor:
        """A tensor's bytes as the file has them, or those of one expert."""
        import torch

        mapped = self._maps.get(info.file)
        if mapped is None:
            raise ValueError(f"{self.source} is closed")
        if mapped.size() < info.start + info.nbytes:  # a page beyond the end would kill the process (SIGBUS)
            raise damaged(info.file, "became shorter while it was in use")
        start, nbytes = (info.start, info.nbytes) if expert is None else _part(info, expert)
        return torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=start)

    def _forget(self, info: TensorInfo, expert: int | None) -> None:
        """Let the system have the pages that `_raw` was read from: what they hold has been copied."""
        start, nbytes = (info.start, info.nbytes) if expert is None else _part(info, expert)
        first, end = -(-start // mmap.PAGESIZE), (start + nbytes) // mmap.PAGESIZE
        if end > first and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[info.file].madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)

    def nbytes_of(self, name: str) -> int:
        return self._file.tensors[gguf_name(name)].nbytes

    def expert_extents(self, layer: int, expert: int) -> tuple[Extent, ...]:
        return tuple(Extent(info.file, *_part(info, expert)) for info in self._experts(layer))

    def expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> FloatExpert:
        if data is None:
            return FloatExpert(*(self.expert_matrix(layer, expert, matrix) for matrix in range(len(MATRICES))))
        return FloatExpert(*map(self._floats, data, self._experts(layer), MATRICES))

    def expert_matrix(self, layer: int, expert: int, matrix: int) -> Tensor:
        info = self._experts(layer)[matrix]
        raw = self._raw(info, expert)
        values = self._floats(raw, info, MATRICES[matrix])
        if values.data_ptr() != raw.data_ptr():
            self._forget(info, expert)
        return values

    def _floats(self, raw: Tensor, info: TensorInfo, matrix: str) -> Tensor:
        """A matrix of an expert: a view of its bytes, if they are floats in this order."""
        import torch

        from .dequantize import FLOATS, fill

        shape = self.config.ffn_config.ffn_hidden_size, self.config.d_model
        stored = FLOATS.get(info.dtype)
        if stored is not None and matrix != "w2":
            return raw.view(stored).view(shape)
        out = torch.empty(shape, dtype=stored or torch.float32)
        fill(out.t() if matrix == "w2" else out, raw, info.dtype)
        return out

    def _experts(self, layer: int) -> tuple[TensorInfo, ...]:
        return tuple(self._file.tensors[f"blk.{layer}.{BLOCK[f'ffn.experts.mlp.{m}']}"] for m in MATRICES)

    def quantized_expert(self, layer: int, expert: int, data: tuple[Tensor, ...] | None = None) -> NoReturn:
        raise ValueError(f"{self.source}: GGUF's types are no format of the experts' kernels")

    def dtypes(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for info in self._file.tensors.values():
            counted[info.dtype] += info.nbytes
        return counted

    def give_back(self) -> None:
        for mapped in self._maps.values():
            give_back(mapped)

    def close(self) -> None:
        self._maps.clear()

    def __enter__(self) -> GgufWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _part(info: TensorInfo, expert: int) -> tuple[int, int]:
    """Start and length of one expert's bytes in a stack."""
    size = info.nbytes // info.shape[0]
    return info.start + expert * size, size
