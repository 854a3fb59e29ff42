"""LoRA adapters in PEFT's format: weight + scale * B @ A, for the matrices of attention and for the router.

Over float weights they are merged while these are read, before any quantization. Over weights that are stored quantized
they are computed beside them: added to numbers on a coarse grid, most of a small change would be rounded away.
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .adapter_config import CONFIG, MAX_RANK, MERGE, LoraConfig, other_adapter
from .checkpoint import FLOATS, Checkpoint
from .config import DbrxConfig
from .errors import ModelError
from .placement import place_of
from .quantization import is_finite
from .safetensors_file import damaged, shown
from .weights import Weights, WrappedWeights

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

WEIGHTS = "adapter_model.safetensors"
KEY = re.compile(
    r"(?:base_model\.model\.)?(transformer\.blocks\.(\d{1,6})\."
    r"(?:norm_attn_norm\.attn\.(?:Wqkv|[qkv]_proj|out_proj)|ffn\.router\.layer))\.lora_([AB])(?:\.default)?\.weight",
    re.ASCII,
)
# What velora_config and monteclora_config keep for training.
TRAINING = re.compile(r".*\.lora_(?:velora_embed|monteclora_sampler)\b.*")
# The module that a tensor belongs to, whatever kind of change it is part of.
MODULE = re.compile(r"(?:base_model\.model\.)?(.+?)\.(?:base_layer|lora_\w+|modules_to_save|token_adapter)\b.*")


@dataclass(frozen=True)
class LowRank:
    """A change of some rows of a matrix: a [rank, in], b [out, rank], both in float32; the scale is in b."""

    first_row: int
    a: Tensor
    b: Tensor

    def add_to(self, weight: Tensor) -> None:
        """Change a float32 weight [all outputs, in] in place."""
        weight[self.first_row : self.first_row + len(self.b)] += self.b @ self.a


Changes = dict[str, list[LowRank]]


def read_adapter(folder: str | Path, config: DbrxConfig) -> Changes:
    """The changes of a folder with an adapter for a network of this configuration, by the names of weights.

    `ModelError` if it is damaged, does not fit, or changes what adapters cannot change here.
    """
    folder = Path(os.path.expanduser(folder))
    if other := other_adapter(folder):
        raise other
    settings = LoraConfig(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise ModelError(f"{folder}: holds no {WEIGHTS}", "save the adapter with safe_serialization=True")
    pairs: dict[str, dict[str, Tensor]] = {}
    with Checkpoint.open(folder, WEIGHTS) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if TRAINING.fullmatch(name):
                continue
            found = KEY.fullmatch(name)
            if found is None:
                raise _unsupported(folder / WEIGHTS, name)
            if int(found[2]) >= config.n_layers or info.dtype not in FLOATS:
                raise ModelError(
                    f"{folder / WEIGHTS}: {shown(name)} is for no layer of this model, or of no float type"
                )
            part = checkpoint.read(name).float()
            if not is_finite(part):
                raise damaged(info.file, f"{shown(name)} holds numbers that are not finite")
            pairs.setdefault(found[1], {})[found[3]] = part
    changes: Changes = {}
    for module, pair in pairs.items():
        name, change = _change(module, pair, settings, config, folder / WEIGHTS)
        changes.setdefault(name, []).append(change)
    return changes


def digest(changes: Changes) -> str:
    """One value for all that an adapter changes; "none" if it changes nothing."""
    found = hashlib.sha256()
    for name, several in sorted(changes.items()):
        for change in several:
            found.update(f"{name} {change.first_row} {tuple(change.a.shape)} {tuple(change.b.shape)}".encode())
            found.update(change.a.contiguous().numpy().tobytes() + change.b.contiguous().numpy().tobytes())
    return found.hexdigest() if changes else "none"


def _unsupported(path: Path, name: str) -> ModelError:
    if ".experts." in name:
        return ModelError(
            f"{path}: changes experts ({shown(name)}); adapters can change attention and routers only", MERGE
        )
    found = MODULE.fullmatch(name)
    what = shown(found[1] if found else name)
    return ModelError(f"{path}: {what} belongs to no matrix of attention and no router of DBRX", MERGE)


def _change(
    module: str, pair: dict[str, Tensor], settings: LoraConfig, config: DbrxConfig, path: Path
) -> tuple[str, LowRank]:
    """The weight that a module's pair of matrices changes, and how."""
    head = config.head_dim
    q, kv = config.n_heads * head, config.attn_config.kv_n_heads * head
    first_row, rows = {
        "Wqkv": (0, q + 2 * kv),
        "q_proj": (0, q),
        "k_proj": (q, kv),
        "v_proj": (q + kv, kv),
        "out_proj": (0, config.d_model),
        "layer": (0, config.ffn_config.moe_num_experts),
    }[module.rpartition(".")[2]]
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None:
        raise ModelError(f"{path}: {module} has only one of lora_A and lora_B")
    rank = a.shape[0] if a.dim() == 2 else 0
    if not 0 < rank <= MAX_RANK or a.shape != (rank, config.d_model) or b.shape != (rows, rank):
        raise ModelError(
            f"{path}: {module} has matrices {list(a.shape)} and {list(b.shape)}, which do not fit "
            f"[{rows}, {config.d_model}]",
            "an adapter fits the model that it was trained with only",
        )
    if not settings.selects(module):
        raise ModelError(
            f"{path}: changes {module}, which target_modules, exclude_modules or layers_to_transform leaves out",
            f"peft would leave it out, too: take it into {CONFIG}, or its matrices out of the file",
        )
    fused = re.sub(r"[qkv]_proj$", "Wqkv", module)
    return f"{fused}.weight", LowRank(first_row, a, b * settings.scale(module, rank))


class AdaptedWeights(WrappedWeights):
    """Float weights with an adapter's changes merged as they are read; see `Weights` for the methods."""

    def __init__(self, weights: Weights, changes: Changes) -> None:
        super().__init__(weights)
        self._changes = changes

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", owned: bool = False
    ) -> Tensor:
        if name not in self._changes:
            return self.whole.read(name, dtype, device, owned)
        stored = self.whole.read(name)
        merged = stored.float() if stored.dtype != torch.float32 else stored.clone()
        for change in self._changes[name]:
            change.add_to(merged)
        return merged.to(device, dtype or stored.dtype)


class LoraLinear(nn.Module):
    """A layer whose weight is stored quantized, and an adapter's change beside it."""

    def __init__(self, base: nn.Module, changes: list[LowRank], device: torch.device) -> None:
        super().__init__()
        self.base = base
        self._changes = [LowRank(c.first_row, c.a.to(device), c.b.to(device)) for c in changes]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x."""
        out: Tensor = self.base(x)
        for change in self._changes:
            part = linear(linear(x.float(), change.a), change.b).to(out.dtype)
            out[..., change.first_row : change.first_row + len(change.b)] += part
        return out


def attach(network: DbrxForCausalLM, changes: Changes) -> None:
    """Put an adapter beside the layers of a network that is loaded, each change where its layer lies."""
    for name, several in changes.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        module, place = network.get_submodule(parent), place_of(name, network.device_map)
        assert place is not None
        setattr(module, leaf, LoraLinear(module.get_submodule(leaf), several, place))
