"""A checkpoint's safetensors files: find them, check every header before anything is loaded, read tensors by name.

Imports without torch.
"""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from .config import DbrxConfig
from .errors import ModelError
from .quantization import is_finite
from .safetensors_file import (
    HEADER,
    TensorInfo,
    damaged,
    give_back,
    how_to_get,
    map_file,
    opened,
    parse_json,
    read_bytes,
    read_header,
    shown,
)

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_TENSORS = 50_000
SHARD_NAME = re.compile(r"[\w+-][\w.+-]{0,200}\.safetensors", re.ASCII)
# Buffers that some programs save beside the parameters; they are computed from the config.
HARMLESS = re.compile(r".*\.((rotary_emb|rope)\.inv_freq|input_scale)")
FLOATS = ("F32", "BF16", "F16")
FITS = "config.json and the weights must come from the same checkpoint"  # the hint where they do not

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

MADE_FROM = "give the checkpoint they were made from"
BY_OTHERS = "quantized weights of another program"
# Other layouts of the same weights, by a piece of a tensor's name; the first that fits is named in the error.
OTHER_LAYOUTS = (
    (r"\.lora_(A|B|embedding_A|embedding_B)\b", "a LoRA adapter",
     "give the base model with -m, and this folder with --adapter"),
    (r"\.(SCB|absmax|quant_state\..*)$", f"{BY_OTHERS}, bitsandbytes", MADE_FROM),
    (r"\.weight_(packed|global_scale)$", f"{BY_OTHERS}, compressed-tensors", MADE_FROM),
    (r"\.(w1|v1|w2)_weight(_scale)?$", f"{BY_OTHERS}, AMD Quark", MADE_FROM),
    (r"\.(q_invperm|q_groups|q_scale_max|trellis|suh|svh)$", f"{BY_OTHERS}, ExLlama", MADE_FROM),
    (r"\._weight_(qdata|scale)$", f"{BY_OTHERS}, torchao", MADE_FROM),
    (r"\.weight\._(data|scale)$", f"{BY_OTHERS}, quanto", MADE_FROM),
    (r"\.W_q$", f"{BY_OTHERS}, HQQ", MADE_FROM),
    (r"\.B$", f"{BY_OTHERS}, Marlin", MADE_FROM),
    (r"\.(qweight|qzeros)$", "weights quantized by GPTQ or AWQ, and nothing that says which",
     "GPTQ's have g_idx beside each qweight, of AWQ's config.json says so: copy the folder again with all its files"),
    (r"([._]scales?(_inv)?|\.biases)$", BY_OTHERS, MADE_FROM),
    (r"experts?\.(.*\.)?\d+\.", "experts under names that are not known",
     "give a checkpoint in Databricks' own layout (ffn.experts.mlp.w1 and so on)"),
    (r"^model\.(layers|embed_tokens)\.", "the weights of another architecture",
     "give the folder of a DBRX checkpoint"),
)  # fmt: skip


# Models that other programs run, by a file in the folder.
OTHER_FILES = (
    (r"openvino_.*", "belongs to a model for OpenVINO, which cannot be read", MADE_FROM),
    (r".*\.onnx|onnx", "belongs to a model for ONNX, which cannot be read", MADE_FROM),
    (r".*\.(h5|msgpack)", "holds weights for TensorFlow or Flax, which cannot be read", MADE_FROM),
    (r".*\.distcp", "is a part of a distributed checkpoint, which can run code: not loaded",
     "have the program that trained it write safetensors"),
)  # fmt: skip

EMBEDDING = "transformer.wte.weight"
MATRICES = ("w1", "v1", "w2")  # of an expert, in the order of `FloatExpert`


def expected_tensors(config: DbrxConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a DBRX checkpoint; experts are stacked on the first dimension."""
    d, ffn = config.d_model, config.ffn_config
    kv_size = config.attn_config.kv_n_heads * config.head_dim
    stacked = (ffn.moe_num_experts * ffn.ffn_hidden_size, d)
    block: dict[str, tuple[int, ...]] = {
        "norm_attn_norm.norm_1.weight": (d,),
        "norm_attn_norm.norm_2.weight": (d,),
        "norm_attn_norm.attn.Wqkv.weight": (d + 2 * kv_size, d),
        "norm_attn_norm.attn.out_proj.weight": (d, d),
        "ffn.router.layer.weight": (ffn.moe_num_experts, d),
        "ffn.experts.mlp.w1": stacked,
        "ffn.experts.mlp.v1": stacked,
        "ffn.experts.mlp.w2": stacked,
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d)}
    for i in range(config.n_layers):
        shapes |= {f"transformer.blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {"transformer.norm_f.weight": (d,), "lm_head.weight": (config.vocab_size, d)}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of one folder, checked and memory-mapped; a context manager."""

    folder: Path
    source: Path  # the index, or the only file
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]  # `__metadata__` of all files together
    _maps: dict[Path, mmap.mmap] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, only: str | None = None) -> Checkpoint:
        """Find the files of a folder, or take the `only` one, and check all their headers; no tensor is read.

        `ModelError` names the first file that is missing, damaged, or not what it should be.
        """
        folder = Path(folder)
        source, weight_map = _find(folder) if only is None else (folder / only, None)
        names = sorted(set(weight_map.values())) if weight_map is not None else [source.name]
        _require_all(folder, names)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        maps: dict[Path, mmap.mmap] = {}
        for path in (folder / name for name in names):
            with opened(path, folder) as (fd, size):
                header = read_header(fd, size, path)
                maps[path] = map_file(fd, size)
            for name in header.tensors:
                if name in tensors:
                    raise ModelError(f"{path}: tensor {shown(name)} is also in {tensors[name].file.name}")
            tensors |= header.tensors
            metadata |= header.metadata
            if len(tensors) > MAX_TENSORS:
                raise ModelError(f"{path}: more than {MAX_TENSORS} tensors: not a DBRX checkpoint")
        if weight_map is not None:
            _match_index(source, weight_map, tensors)
        return cls(folder, source, tensors, metadata, maps)

    def check(self, config: DbrxConfig) -> None:
        """Exactly the tensors that `config` asks for, with their shapes and a float type, or a `ModelError`."""
        found = {name for name in self.tensors if not HARMLESS.fullmatch(name)}
        name_other_layout(self.source, found)
        if config.n_layers > len(found):  # before a table of that length is made
            raise ModelError(f"{self.source}: holds {len(found)} tensors, too few for {config.n_layers} layers")
        expected = expected_tensors(config)
        missing = [name for name in expected if name not in found]
        unexpected = sorted(found - expected.keys())
        if missing:
            also = f"; {len(unexpected)} others are unexpected" if unexpected else ""
            raise ModelError(f"{self.source}: {listed(missing, 'is', 'are')} missing{also}", FITS)
        if unexpected:
            file = self.tensors[unexpected[0]].file
            raise ModelError(f"{file}: {listed(unexpected, 'does', 'do')} not belong to this model", FITS)
        self._check_shapes(expected, config)
        wrong = [info for name in expected if (info := self.tensors[name]).dtype not in FLOATS]
        if wrong:
            types = listed([f"{info.name} ({info.dtype})" for info in wrong], "has", "have")
            why, hint = why_no_float(wrong[0].dtype)
            raise ModelError(f"{wrong[0].file}: {types} {why}", hint)

    def _check_shapes(self, expected: dict[str, tuple[int, ...]], config: DbrxConfig) -> None:
        wrong = [info for name, shape in expected.items() if (info := self.tensors[name]).shape != shape]
        if not wrong:
            return
        ffn = config.ffn_config
        rows = ffn.moe_num_experts * ffn.ffn_hidden_size
        others = {info.shape for info in wrong if ".ffn.experts.mlp." in info.name}
        if len(others) == 1 and (width := others.pop())[0] == rows and all(".ffn." in info.name for info in wrong):
            raise ModelError(
                f"{wrong[0].file}: the experts have {list(width[1:])} columns, d_model is {config.d_model}",
                "transformers 5.0 to 5.14 made them so, and no other release computes with them: run the model there",
            )
        first, more = wrong[0], f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
        raise ModelError(
            f"{first.file}: {first.name} has shape {list(first.shape)}, "
            f"config.json asks for {list(expected[first.name])}{more}",
            FITS,
        )

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
        """One tensor; in its stored type on the CPU it is the file itself, mapped privately: slices cost nothing.

        Writing to it changes memory only. It stays valid after `close`. KeyError for an unknown name.
        """
        return self.read_part(self.tensors[name], dtype, device)

    def read_part(
        self, info: TensorInfo, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """The same for a tensor, or a slice of one, by its place."""
        import torch

        mapped = self._maps.get(info.file)
        if mapped is None:
            raise ValueError(f"the checkpoint {self.folder} is closed")
        if info.dtype not in TORCH_NAMES:
            raise ModelError(f"{info.file}: {shown(info.name)} has type {info.dtype}, which PyTorch cannot hold")
        if mapped.size() < info.start + info.nbytes:  # a page beyond the end would kill the process (SIGBUS)
            raise damaged(info.file, "became shorter while it was in use")
        stored: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype or stored, device=device)
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        if info.start % stored.itemsize:  # old files do not align their data
            raw = raw.clone()
        return raw.view(stored).view(info.shape).to(device=device, dtype=dtype or stored)

    def first_not_finite(self, seconds: float) -> TensorInfo | None:
        """A tensor that holds NaN or an infinity, if one is found in this time."""
        end = monotonic() + seconds
        for info in self.tensors.values():
            if monotonic() > end:
                return None
            if info.dtype in FLOATS and not is_finite(self.read_part(info)):
                return info
        return None

    def dtypes(self) -> Counter[str]:
        """Bytes by stored type."""
        counted: Counter[str] = Counter()
        for info in self.tensors.values():
            counted[info.dtype] += info.nbytes
        return counted

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def give_back(self) -> None:
        """Let the system have the memory that read tensors take; they come from the files again if they are used."""
        for mapped in self._maps.values():
            give_back(mapped)

    def close(self) -> None:
        """Let go of the files; a map lives on as long as a tensor that was read from it."""
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _find(folder: Path) -> tuple[Path, dict[str, str] | None]:
    """The index with its weight_map, or the single file and None."""
    if not os.path.isdir(folder):
        if folder.suffix == ".gguf" and os.path.exists(folder):
            raise ModelError(f"{folder}: is a GGUF file, not a folder with safetensors")
        raise ModelError(f"{folder}: no such folder", "give the folder of a checkpoint, a Hub id (org/name), or `demo`")
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if os.path.lexists(index):
        return index, _read_index(index)
    if os.path.lexists(single):
        return single, None
    raise _nothing_to_load(folder)


def _nothing_to_load(folder: Path) -> ModelError:
    """What the folder holds instead of safetensors with their usual names."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return ModelError(f"{folder}: cannot be read: {error.strerror}")

    def first(pattern: str) -> Path | None:
        return next((folder / name for name in names if re.fullmatch(pattern, name)), None)

    if "adapter_config.json" in names:
        from .adapter_config import is_mlx_adapter, mlx_adapter

        if is_mlx_adapter(names):
            return mlx_adapter(folder)
        _, what, hint = OTHER_LAYOUTS[0]
        return ModelError(f"{folder}: holds {what}, not a whole model", hint)
    if first(r".*-\d+-of-\d+\.safetensors"):
        return ModelError(f"{folder}: {INDEX_NAME} is missing", how_to_get(folder))
    if file := first(r".*\.safetensors"):
        return ModelError(f"{file}: is not called {SINGLE_NAME}", f"rename it to {SINGLE_NAME} if it is the model")
    if file := first(r".*\.gguf"):
        return ModelError(f"{folder}: holds a GGUF file and no safetensors", f"give the file itself: -m {file}")
    for pattern, what, hint in OTHER_FILES:
        if file := first(pattern):
            return ModelError(f"{file}: {what}", hint)
    if file := first(r".*\.(bin|pt|pth|ckpt|pkl)"):
        return ModelError(
            f"{file}: pickle files are not loaded, because they can run code",
            "convert the checkpoint to safetensors where you trust it, or take one that has them",
        )
    return ModelError(f"{folder}: holds no weights ({INDEX_NAME} or {SINGLE_NAME})", how_to_get(folder))


def _read_index(index: Path) -> dict[str, str]:
    weight_map = parse_json(read_bytes(index, HEADER.nbytes), index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, "has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise ModelError(f"{index}: weight_map names {shown(str(file))}, which is no safetensors file beside it")
    return weight_map


def _require_all(folder: Path, names: list[str]) -> None:
    missing = [i for i, name in enumerate(names) if not os.path.exists(folder / name)]
    if missing:
        first, rest = missing[0], f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        gone = f"shard {first + 1} of {len(names)} is missing{rest}"
        raise ModelError(f"{folder / names[first]}: {gone}", how_to_get(folder))


def _match_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """The index and the shards must tell the same story."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ModelError(f"{index.parent / file}: lacks tensor {shown(name)}, which {index.name} puts there")
    for name, info in tensors.items():
        if name not in weight_map:
            raise ModelError(f"{info.file}: holds tensor {shown(name)}, which {index.name} does not list")


def name_other_layout(source: Path, names: Iterable[str]) -> None:
    """Raise when the names are those of a known layout that is not Databricks' own."""
    ordered = sorted(names)
    for pattern, what, hint in OTHER_LAYOUTS:
        example = next((name for name in ordered if re.search(pattern, name)), None)
        if example is not None:
            raise ModelError(f"{source}: holds {what} ({shown(example)})", hint)


def why_no_float(dtype: str) -> tuple[str, str]:
    """Why weights of a type cannot be read, and what to do."""
    if dtype == "F64":
        return "64 bits, which are not read", "save the model in float32 or bfloat16"
    return "no float type: quantized, or another layout", f"{MADE_FROM}: weights must be one of {', '.join(FLOATS)}"


def listed(names: list[str], one: str, many: str) -> str:
    """The first tensors of several and a verb, `one` or `many`: "2 tensors (a, b) are"."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    noun, verb = ("tensor", one) if len(names) == 1 else ("tensors", many)
    return f"{len(names)} {noun} ({', '.join(map(shown, names[:3]))}{more}) {verb}"
