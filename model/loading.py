"""The composer: from a checkpoint's name to a network that is ready to run.

Build on the meta device, choose a dtype and devices, read each tensor straight to its place, attach the hooks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .errors import ModelError, ResourceError
from .formats import Weights, open_weights
from .generation_config import GenerationConfig
from .hub import resolve

if TYPE_CHECKING:
    from .transformer import DbrxForCausalLM

Network = TypeVar("Network", bound="DbrxForCausalLM")
DeviceMap = Mapping[str, Any]
BLOCK = "DbrxBlock"  # never split: a block's input and output stay on one device
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def from_pretrained(
    cls: type[Network],
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device_map: str | int | torch.device | DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Network:
    """Load a checkpoint from a folder or a Hub id, ready for inference.

    dtype (or torch_dtype): "auto" keeps the checkpoint's. device_map: a device, "auto", "balanced" or "sequential"
    through accelerate within `max_memory`, or a dict of module names to devices; None is the CPU.
    attn_implementation: auto, eager, sdpa, flash (or flash_attention_2). `trust_remote_code` is accepted and has no
    effect: code that a checkpoint ships is never run. `progress` hears bytes read and bytes in all.

    `ModelError` if the checkpoint is missing, damaged or of another kind, `ResourceError` if it does not fit.
    """
    folder = resolve(name_or_path, revision=revision, token=token)
    with open_weights(folder) as weights:
        chosen = _dtype(dtype if dtype is not None else torch_dtype, weights)
        with torch.device("meta"):
            network = cls(weights.config, attn_implementation="eager").to(chosen).eval()
        places = plan_devices(network, device_map, max_memory, chosen)
        _read_weights(network, weights, places, chosen, progress)
    network.generation_config = GenerationConfig.from_folder(folder)
    network.device_map = dict(places)
    if len(set(places.values())) > 1:
        from accelerate import dispatch_model

        dispatch_model(network, dict(places))
    network.transformer.set_attention(attn_implementation)
    return network


def save_pretrained(network: DbrxForCausalLM, folder: Path, max_shard_size: int) -> None:
    """Write the network as a checkpoint folder that `from_pretrained` reads."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    network.config.save_pretrained(folder)
    generation = (network.generation_config or GenerationConfig()).to_dict()
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", "utf-8")
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def plan_devices(
    network: DbrxForCausalLM,
    device_map: str | int | torch.device | DeviceMap | None,
    max_memory: Mapping[int | str, int | str] | None,
    dtype: torch.dtype,
) -> dict[str, torch.device]:
    """Module names -> devices; "" stands for all. `ModelError` if a named device is not there."""
    if isinstance(device_map, Mapping):
        return {name: _device(place) for name, place in device_map.items()}
    if device_map not in ("auto", "balanced", "sequential"):
        return {"": _device("cpu" if device_map is None else device_map)}
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    limits = dict(max_memory) if max_memory else None
    if device_map != "sequential":
        limits = get_balanced_memory(network, limits, no_split_module_classes=[BLOCK], dtype=dtype)
    places = infer_auto_device_map(network, limits, no_split_module_classes=[BLOCK], dtype=dtype)
    if "disk" in places.values():
        weights = sum(p.numel() for p in network.parameters()) * dtype.itemsize
        raise ResourceError(
            f"the weights take {weights / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, "
            "more than the memory that is free (or that --max-memory allows)",
            "free memory, raise --max-memory, or try a smaller --dtype",
        )
    return {name: _device(place) for name, place in places.items()}


def _device(place: str | int | torch.device) -> torch.device:
    """A device that is there; `ModelError` otherwise."""
    try:
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    except RuntimeError:
        raise ModelError(f"{place!r} is not a device", "devices are cpu, cuda, cuda:0, mps, ...") from None
    module = getattr(torch, device.type, None)
    there = device.type == "cpu" or (
        module is not None and module.is_available() and (device.index or 0) < module.device_count()
    )
    if not there:
        raise ModelError(f"there is no device {str(device)!r} here", "leave out the device, or name cpu")
    return device


def _dtype(wanted: str | torch.dtype | None, weights: Weights) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted in (None, "auto"):
        (stored, _), *_ = weights.dtypes().most_common(1)
        return STORED[stored]
    if wanted not in DTYPES:
        raise ValueError(f"dtype {wanted!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[wanted]


def _read_weights(
    network: DbrxForCausalLM,
    weights: Weights,
    places: Mapping[str, torch.device],
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Each tensor once, to its device; on the CPU in its stored dtype it stays a map of the file, uncopied."""
    names = list(network.state_dict())
    total = sum(map(weights.nbytes_of, names))
    state, done = {}, 0
    for name in names:
        prefix = max((p for p in places if not p or name == p or name.startswith(p + ".")), key=len)
        state[name] = weights.read(name, dtype=dtype, device=places[prefix])
        done += weights.nbytes_of(name)
        if progress:
            progress(done, total)
    network.load_state_dict(state, assign=True)
