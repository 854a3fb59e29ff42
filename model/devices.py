"""Which module goes to which device: one for all, accelerate's choice, or a map that was given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError, ModelError, ResourceError
from .machine import available_memory, parse_size
from .placement import FORMATS, capacity, sizes
from .safetensors_file import read_json

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

DeviceMap = Mapping[str, Any]
AUTOMATIC = ("auto", "balanced", "sequential")
BLOCK = "DbrxBlock"  # never split: a block's input and output stay on one device
CONTEXT = 4096  # tokens that room is left for
MOST_DEVICES = 128  # torch keeps their numbers in a byte


def plan_devices(
    network: DbrxForCausalLM,
    device_map: str | int | torch.device | DeviceMap | None,
    max_memory: Mapping[int | str, int | str] | None,
    dtype: torch.dtype,
    context: int = CONTEXT,
) -> dict[str, torch.device]:
    """Module names -> devices; "" stands for all. `ModelError` if a named device is not there.

    device_map: a device, a map of modules or a JSON file with one; "auto" and "balanced" spread the blocks over the
    GPUs, "sequential" fills one after the other, within `max_memory` less what cache and activations will need.
    """
    if isinstance(device_map, str) and device_map.endswith(".json"):
        device_map = read_device_map(Path(device_map))
    if isinstance(device_map, Mapping):
        _require_all(network, device_map)
        return {name: find_device(place) for name, place in device_map.items()}
    if device_map not in AUTOMATIC:
        return {"": find_device("cpu" if device_map is None else device_map)}
    places = assign(network, budgets(network, max_memory, dtype, context), dtype, balanced=device_map != "sequential")
    if "disk" in places.values():
        weights = sum(p.numel() for p in network.parameters()) * dtype.itemsize
        raise too_large(weights, str(dtype).removeprefix("torch."))
    return {name: find_device(place) for name, place in places.items()}


def too_large(nbytes: int, form: str) -> ResourceError:
    """Weights of so many bytes in that form find no room."""
    return ResourceError(
        f"the weights take {nbytes / 1e9:.1f} GB in {form}, "
        "more than the memory that is free (or that --max-memory allows)",
        "read the experts from the disk as they are needed (--offload disk), or see `dbrx plan` for what fits",
    )


def assign(
    network: DbrxForCausalLM, limits: dict[int | str, int], dtype: torch.dtype, balanced: bool
) -> dict[str, int | str]:
    """accelerate's map for a network that may be on the meta device: modules -> GPU number, "cpu" or "disk"."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = {"no_split_module_classes": [BLOCK], "dtype": dtype}
    if balanced:
        limits = get_balanced_memory(network, limits, **whole)
    places: dict[str, int | str] = infer_auto_device_map(network, limits, **whole)
    return places


def dispatch(network: DbrxForCausalLM, places: DeviceMap, **options: Any) -> None:
    """accelerate's hooks: activations move to where a module lies, weights that are kept elsewhere come as it runs."""
    from accelerate import dispatch_model

    # The experts read the parameters of their submodule without calling it, so its hook would never run.
    dispatch_model(network, dict(places), preload_module_classes=["ResidentExperts"], **options)


def budgets(
    network: DbrxForCausalLM, max_memory: Mapping[int | str, int | str] | None, dtype: torch.dtype, context: int
) -> dict[int | str, int]:
    """Bytes for weights by device (GPU number or "cpu"): what is free or allowed, less cache and activations."""
    from accelerate.utils import get_max_memory

    if max_memory:
        limits = {device: parse_size(str(amount)) for device, amount in max_memory.items()}
    else:
        limits = get_max_memory()
        limits["cpu"] = min(limits["cpu"], available_memory())  # accelerate knows no control groups
    parts = sizes(network.config, FORMATS[str(dtype).removeprefix("torch.")])
    computing = [device for device in limits if device != "cpu"] or ["cpu"]
    layers = -(-parts.n_layers // len(computing))
    reserve = parts.buffers + layers * parts.kv * capacity(min(context, network.config.max_seq_len))
    return {device: max(0, limit - (reserve if device in computing else 0)) for device, limit in limits.items()}


def read_device_map(path: Path) -> dict[str, Any]:
    """A JSON object of module names and devices, such as {"transformer.wte": 0, ..., "lm_head": "cpu"}."""
    try:
        places = read_json(path.resolve())  # a link is the user's own
    except ModelError as fault:
        raise InputError(f"--device-map {fault.message}", "give a file that `dbrx plan MODEL --json` prints") from None
    for name, place in places.items():
        if not (isinstance(place, str) or (type(place) is int and 0 <= place < MOST_DEVICES)):
            raise InputError(
                f"--device-map {path}: {name!r:.80} must be a device, not {place!r:.80}", "such as 0 or cpu"
            )
        try:
            find_device(place)
        except ModelError as fault:
            raise ModelError(f"--device-map {path}: {name!r:.80}: {fault.message}", fault.hint) from None
    return places


def _require_all(network: DbrxForCausalLM, places: DeviceMap) -> None:
    names = [""] if "" in places else places
    homeless = [
        name for name in network.state_dict() if not any(not p or name == p or name.startswith(p + ".") for p in names)
    ]
    if homeless:
        raise InputError(
            f"the device map names no device for {homeless[0]}",
            f"{len(homeless)} tensors are left out; `dbrx plan MODEL --json` prints a whole map",
        )


def find_device(place: str | int | torch.device) -> torch.device:
    """A device that is there; `ModelError` otherwise."""
    try:
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    except RuntimeError:
        raise ModelError(
            f"{place!r} is not a device", "devices are cpu, cuda, cuda:0, mps, ...; or give a .json file with a map"
        ) from None
    module = getattr(torch, device.type, None)
    there = device.type == "cpu" or (
        module is not None and module.is_available() and (device.index or 0) < module.device_count()
    )
    if not there:
        raise ModelError(f"there is no device {str(device)!r} here", "leave out the device, or name cpu")
    return device
