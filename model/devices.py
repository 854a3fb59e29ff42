"""Devices by their names, maps of modules to them, and accelerate's hooks for several at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import expected_tensors
from .config import DbrxConfig
from .errors import InputError, ModelError
from .safetensors_file import read_json

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

DeviceMap = Mapping[str, Any]
MOST_DEVICES = 128  # torch keeps their numbers in a byte


def dispatch(network: DbrxForCausalLM, places: DeviceMap, **options: Any) -> None:
    """accelerate's hooks: activations move to where a module lies, weights that are kept elsewhere come as it runs.

    What lies on the CPU comes to the first GPU of the map.
    """
    from accelerate import dispatch_model

    # accelerate knows the CPU by its name only, and takes any GPU for the first.
    named = {module: str(place) for module, place in places.items()}
    first = next((place for place in named.values() if place not in ("cpu", "disk")), "cpu")
    # The experts read the parameters of their submodule without calling it, so its hook would never run.
    options = {"main_device": first, "preload_module_classes": ["ResidentExperts"], **options}
    dispatch_model(network, named, **options)


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


def require_all(config: DbrxConfig, places: DeviceMap) -> None:
    """`InputError` if a map leaves a tensor out."""
    names = [""] if "" in places else places
    tensors = expected_tensors(config)
    homeless = [name for name in tensors if not any(not p or name == p or name.startswith(p + ".") for p in names)]
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
    return torch.device("cpu") if device.type == "cpu" else device  # "cpu:0" is the same one
