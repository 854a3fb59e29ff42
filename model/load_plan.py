"""Everything that loading decides, as one value, and what it depends on. `plan_load` (`load_planner`) makes it,
loading executes it, `dbrx plan` prints it. Imports without torch.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .errors import DbrxError
from .expert_use import Counts
from .placement import (
    FLOAT_BYTES,
    KV_BLOCK,
    PREFILL_CHUNK,
    Device,
    Format,
    KernelFacts,
    Layer,
    Machine,
    Sizes,
    capacity,
)
from .quantization import SCHEMES

if TYPE_CHECKING:
    from .weights import Weights

AUTOMATIC = ("auto", "balanced", "sequential")
OFFLOADS = ("auto", "none", "cpu", "disk")
CONTEXT = 4096  # tokens that room is left for, unless more or fewer are asked for
ARRIVING = 2  # experts on their way to a full GPU; as floats they take what is free until there are keys and values
# Safetensors' names of the types that weights keep; all others become bfloat16.
STORED_FLOATS: Mapping[str, str] = MappingProxyType({"BF16": "bfloat16", "F16": "float16", "F32": "float32"})


@dataclass(frozen=True)
class Stored:
    """What the files of a checkpoint hold, as far as a plan depends on it."""

    dtype: str = "BF16"  # of most bytes, under safetensors' name
    scheme: str = "none"  # of the experts: a key of `SCHEMES`, or one of `KEPT`
    group: int | None = None  # inputs that share a scale, where the scheme has groups
    plain_experts: bool = True  # see `Weights`
    slot: int | None = None  # bytes that hold any expert as it is read; None where the files are not here
    kept: Format | None = None  # see `Weights`

    @classmethod
    def of(cls, weights: Weights) -> Stored:
        """Of weights that are open."""
        from .streaming.source import slot_size

        config = weights.config
        ids = range(config.ffn_config.moe_num_experts)
        extents = (weights.expert_extents(layer, expert) for layer in range(config.n_layers) for expert in ids)
        dtype = weights.dtypes().most_common(1)[0][0]
        return cls(dtype, weights.quantization, weights.group, weights.plain_experts, slot_size(extents), weights.kept)

    @property
    def float_type(self) -> str | None:
        """PyTorch's name of the type, if it is a float type that weights keep."""
        return STORED_FLOATS.get(self.dtype) if self.scheme == "none" else None

    def holds(self, scheme: str) -> bool:
        """Whether the experts are stored as they are computed with in a scheme."""
        return self.scheme == scheme and (scheme != "none" or self.plain_experts)

    def keeps(self, dtype: str) -> bool:
        """Whether floats keep their type: others are another copy."""
        return self.scheme != "none" or self.float_type == dtype


@dataclass(frozen=True)
class LoadOptions:
    """What the user asks for; see `from_pretrained`."""

    dtype: str = "auto"
    quantize: str = "none"
    pack: bool = False
    device_map: str | Mapping[str, Any] = "cpu"
    max_memory: Mapping[int | str, int | str] | None = None
    offload: str = "none"
    expert_cache: int | None = None  # bytes
    context: int | None = None
    ranks: int = 1  # processes that share every layer
    use: Counts = ()  # of the experts so far: where a card does not hold all, it holds those of most use

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dtype", self.dtype, ("auto", *FLOAT_BYTES)),
            ("quantize", self.quantize, ("auto", "none", *SCHEMES)),
            ("offload", self.offload, OFFLOADS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")


@dataclass(frozen=True)
class LoadPlan:
    """What lies where, and in which form. Where it does not run, `fault` says why, and no layer lies anywhere."""

    machine: Machine  # that computes: without GPUs that are not used
    sizes: Sizes
    format: str  # of the weights, such as int4-g128
    dtype: str  # of the activations
    kv_dtype: str  # of cached keys and values
    scheme: str  # a key of `SCHEMES`, one of `KEPT`, or none
    kernel: KernelFacts | None  # that the weights are packed for; None: they are tensors, for PyTorch
    converts: bool  # the experts are quantized as they are read
    as_stored: bool  # the experts are computed with in the form that the files hold
    mapped: bool  # the experts are pages of the files, which give way where memory is short
    context: int
    chunk: int = PREFILL_CHUNK  # tokens a step of prefill
    layers: tuple[Layer, ...] = ()
    device_map: Mapping[str, str | int] = field(default_factory=dict)  # module -> device, all modules
    weights: Mapping[str, int] = field(default_factory=dict)  # bytes by device; streamed experts not counted
    kv: Mapping[str, int] = field(default_factory=dict)
    kept: int = 0  # experts of those that are streamed that find room beside what computes them
    cache: int = 0  # bytes of that device for them, with what is on its way
    use: Counts = ()  # by which the experts of layers lie on a GPU or on the CPU
    notices: tuple[str, ...] = ()
    fault: DbrxError | None = None

    @property
    def devices(self) -> tuple[Device, ...]:
        """Where layers and experts can lie, but for the disk."""
        return (*self.machine.gpus, self.machine.cpu)

    @property
    def runs(self) -> bool:
        return self.fault is None

    @property
    def resident(self) -> bool:
        """Whether all weights lie where they are used."""
        return self.runs and all(layer.experts == layer.device and not self.comes(layer) for layer in self.layers)

    @property
    def offload(self) -> str:
        """Where all experts wait to be streamed, cpu or disk; none where they do not."""
        return next((layer.experts for layer in self.layers if layer.experts != layer.device), "none")

    @property
    def on_cpu(self) -> int:
        """Experts that the CPU computes beside a GPU."""
        return sum(layer.on_cpu for layer in self.layers)

    @property
    def experts_by_place(self) -> Counter[str]:
        """How many experts lie on each device, or on the disk."""
        found: Counter[str] = Counter()
        for layer in self.layers:
            found += Counter({layer.experts: self.sizes.n_experts - layer.on_cpu}) + Counter(cpu=layer.on_cpu)
        return found

    @property
    def on_disk(self) -> int:
        """Layers whose experts are read from the disk as they are needed."""
        return sum(layer.experts == "disk" for layer in self.layers)

    @property
    def streamed(self) -> int:
        """Layers whose experts come from elsewhere as they are needed, and stay in a cache."""
        return sum(layer.experts != layer.device for layer in self.layers)

    @property
    def hits(self) -> float:
        """Share of the streamed experts that the cache holds when routing is uniform: the least it can be."""
        return min(1.0, self.kept / (self.streamed * self.sizes.n_experts)) if self.streamed else 1.0

    def comes(self, layer: Layer) -> bool:
        """Whether a whole layer lies in the CPU's memory and comes to a GPU to run."""
        return layer.device == "cpu" and bool(self.machine.gpus)

    def free(self, device: Device) -> int:
        """Bytes that a device has left."""
        used = self.weights.get(device.name, 0) + self.kv.get(device.name, 0)
        working = self.sizes.buffers if used else 0
        return device.memory - used - working - self.cache_on(device) - self.arriving_on(device)

    def cache_on(self, device: Device) -> int:
        """Bytes of a device that hold experts from elsewhere."""
        return self.cache if self.runs and self.layers and device.name == self.layers[0].device else 0

    def arriving_on(self, device: Device) -> int:
        """Bytes of a GPU that are kept for what comes to it to be computed, and goes again."""
        parts, layers = self.sizes, [layer for layer in self.layers if layer.device == device.name]
        if any(layer.away for layer in layers):
            return ARRIVING * parts.expert
        first = next((layer.device for layer in self.layers if layer.device != "cpu"), None)
        return parts.dense + parts.experts if device.name == first and any(map(self.comes, self.layers)) else 0

    @property
    def kv_room(self) -> int:
        """Bytes of keys and values, all layers together, that this layout has room for."""
        shares = [(self.free(device) + used, used) for device in self.devices if (used := self.kv.get(device.name, 0))]
        return min((room * sum(self.kv.values()) // used for room, used in shares), default=sys.maxsize)

    def largest_context(self, limit: int) -> int:
        """The largest context up to `limit` that this layout has room for; the experts' cache gives way to it."""
        room = limit
        for device in self.devices:
            used = self.kv.get(device.name, 0)
            if used:
                count = used // (self.sizes.kv * capacity(self.context))
                spare = self.free(device) + used + self.cache_on(device)
                room = min(room, spare // (count * self.sizes.kv) // KV_BLOCK * KV_BLOCK)
        return room if self.runs else 0
