"""Everything that loading decides, as one value: `plan_load` makes it, loading executes it, `dbrx plan` prints it.

Arithmetic alone: what is stored, a machine and options in; what lies where, in which form, and with room for how many
tokens, out. Imports without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .config import DbrxConfig
from .errors import DbrxError, ModelError, ResourceError
from .machine import limited
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
    format_of,
    sizes,
)
from .quantization import DENSE, GGUF, SCHEMES

if TYPE_CHECKING:
    from .weights import Weights

AUTOMATIC = ("auto", "balanced", "sequential")
OFFLOADS = ("auto", "none", "cpu", "disk")
CONTEXT = 4096  # tokens that room is left for, unless more or fewer are asked for
CACHE_SHARE = 0.75  # of the memory that is left: what streamed experts get, unless the user says how much
READING_AHEAD = 4  # slots that are read to, where experts are then packed into memory of their own
STREAMED_CHUNK = 2048  # tokens a step of prefill: it reads nearly all experts of each layer, however few its tokens are
# Safetensors' names of the types that weights keep; all others become bfloat16.
STORED_FLOATS: Mapping[str, str] = MappingProxyType({"BF16": "bfloat16", "F16": "float16", "F32": "float32"})
ON_THE_CPU = "give --device-map cpu, or see `dbrx plan` for what fits"


@dataclass(frozen=True)
class Stored:
    """What the files of a checkpoint hold, as far as a plan depends on it."""

    dtype: str = "BF16"  # of most bytes, under safetensors' name
    scheme: str = "none"  # of the experts: a key of `SCHEMES`, or `GGUF`
    group: int | None = None  # inputs that share a scale, where the scheme has groups
    plain_experts: bool = True  # see `Weights`
    slot: int | None = None  # bytes that hold any expert as it is read; None where the files are not here
    blocks: Format | None = None  # see `Weights`

    @classmethod
    def of(cls, weights: Weights) -> Stored:
        """Of weights that are open."""
        from .streaming.source import slot_size

        config = weights.config
        ids = range(config.ffn_config.moe_num_experts)
        extents = (weights.expert_extents(layer, expert) for layer in range(config.n_layers) for expert in ids)
        dtype = weights.dtypes().most_common(1)[0][0]
        return cls(
            dtype, weights.quantization, weights.group, weights.plain_experts, slot_size(extents), weights.blocks
        )

    @property
    def float_type(self) -> str | None:
        """PyTorch's name of the type, if it is a float type that weights keep."""
        return STORED_FLOATS.get(self.dtype) if self.scheme == "none" else None


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
    scheme: str  # a key of `SCHEMES`, `GGUF`, or none
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
        return device.memory - used - working - self.cache_on(device)

    def cache_on(self, device: Device) -> int:
        """Bytes of a device that hold experts from elsewhere."""
        return self.cache if self.runs and self.layers and device.name == self.layers[0].device else 0

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


def plan_load(config: DbrxConfig, stored: Stored, machine: Machine, options: LoadOptions) -> LoadPlan:
    """Decide all that loading does. `ModelError` for what cannot be combined; what finds no room has a `fault`.

    Beside GPUs, `offload` "auto" and "none" spread whole layers over them, and leave the rest in the CPU's memory.
    Else one device computes, the first GPU or the CPU: "disk" leaves the experts on the disk, "cpu" in the CPU's
    memory beside a GPU, and "auto" on the disk if they do not fit. Weights in few bits lie
    on one GPU or on none. quantize "auto" makes int8 of floats that then
    stay in the CPU's memory, where no dtype is asked for, and keeps all else.
    """
    machine = _computing(limited(machine, options.max_memory or {}), options.device_map)
    quantize = options.quantize
    if stored.blocks is not None and _keeps_blocks(stored, machine, options):
        stored = replace(stored, scheme=GGUF)
        quantize = "none"
    if quantize == "auto":
        floats = stored.float_type is not None and options.dtype == "auto" and _packs(machine, options)
        quantize = DENSE if floats and options.ranks == 1 else "none"
        if quantize == DENSE and (plan := _Planner(config, stored, machine, options, DENSE).plan()).resident:
            form = f"the weights become {DENSE} as they are read; --quantize none computes with them as stored"
            return replace(plan, notices=(form, *plan.notices))
        quantize = "none"
    return _Planner(config, stored, machine, options, quantize).plan()


def _computing(machine: Machine, device_map: str | Mapping[str, Any]) -> Machine:
    """The machine without the GPUs that a device map leaves out. Of a device that is not known, the room is not."""
    if device_map in AUTOMATIC or not isinstance(device_map, str):
        return machine
    name = "cuda:0" if device_map == "cuda" else device_map
    unknown = Device(name, 2**62, inf, inf)
    named = next((gpu for gpu in machine.gpus if gpu.name == name), unknown)
    return replace(machine, gpus=() if device_map == "cpu" else (named,))


def _packs(machine: Machine, options: LoadOptions) -> bool:
    """Whether the CPU computes all, so that its kernels can hold the weights."""
    return not machine.gpus and isinstance(options.device_map, str)


def _on_one_card(machine: Machine, options: LoadOptions, scheme: str, group: int | None) -> tuple[Machine, KernelFacts]:
    """The machine with the GPU that holds and computes weights in few bits, and its kernels."""
    apart = not isinstance(options.device_map, str) or options.offload in ("cpu", "disk") or options.ranks > 1
    if apart or scheme not in SCHEMES:
        raise ModelError(f"{scheme} weights compute on one GPU that holds all of them, or on the CPU", ON_THE_CPU)
    card = max(machine.gpus, key=lambda gpu: gpu.memory)
    kernel = machine.card(scheme, group, card.name)
    if kernel is None:
        wanted = "Triton and a GPU of compute capability 8.0 (Ampere) or newer"
        raise ModelError(f"{card.name} has no kernels for {scheme} weights: they need {wanted}", ON_THE_CPU)
    return replace(machine, gpus=(card,)), kernel


def _keeps_blocks(stored: Stored, machine: Machine, options: LoadOptions) -> bool:
    """Whether a GGUF file's blocks are computed in: who names a type, or another form, asks for its numbers."""
    free = options.quantize in ("auto", "none") and options.dtype == "auto" and options.pack and options.ranks == 1
    return free and _packs(machine, options) and machine.kernel(GGUF, None, GGUF) is not None


def too_large(nbytes: int, form: str) -> ResourceError:
    """Weights of so many bytes in that form find no room."""
    return ResourceError(
        f"the weights take {nbytes / 1e9:.1f} GB in {form}, "
        "more than the memory that is free (or that --max-memory allows)",
        "read the experts from the disk as they are needed (--offload disk), or see `dbrx plan` for what fits",
    )


class _Planner:
    """A plan in the making, for one form of the weights."""

    def __init__(
        self, config: DbrxConfig, stored: Stored, machine: Machine, options: LoadOptions, quantize: str
    ) -> None:
        self.config, self.stored, self.machine, self.options = config, stored, machine, options
        scheme = quantize if quantize != "none" else stored.scheme
        packs = _packs(machine, options)
        has_groups = scheme in SCHEMES and SCHEMES[scheme].groups
        group = stored.group if scheme == stored.scheme and has_groups else None
        dtype = (stored.float_type or "bfloat16") if options.dtype == "auto" else options.dtype
        form = dtype if scheme == "none" else scheme
        wanted = packs and options.ranks == 1 and (options.pack or scheme != "none")
        kernel = machine.kernel(form, group, stored.scheme) if wanted else None
        if scheme != "none" and not packs:
            machine, kernel = _on_one_card(machine, options, scheme, group)
            self.machine = machine
        activations = kernel.dtype if kernel else dtype
        kv_dtype = dtype if scheme == "none" else activations
        as_stored = stored.float_type if kernel and packs else None  # the embedding, of which rows are read
        embedding: float = FLOAT_BYTES[as_stored or dtype]
        if scheme == GGUF and stored.blocks is not None:
            self.layout, embedding = stored.blocks, stored.blocks.rest
        else:
            self.layout = format_of(scheme, group) if scheme != "none" else Format.floats(dtype)
        ranks = options.ranks
        parts = sizes(config, self.layout, FLOAT_BYTES[activations], FLOAT_BYTES[kv_dtype], embedding)
        self.parts = replace(parts, dense=parts.dense // ranks, expert=parts.expert // ranks, kv=parts.kv // ranks)
        # Whether what is stored is what is computed with.
        self.same = stored.scheme == scheme and (scheme != "none" or stored.plain_experts)
        self.context = min(options.context or CONTEXT, config.max_seq_len)
        streams = kernel.streams if kernel else "cast"
        self.nothing = LoadPlan(
            machine,
            self.parts,
            self.layout.name,
            activations,
            kv_dtype,
            scheme,
            kernel,
            converts=scheme not in ("none", stored.scheme),
            as_stored=self.same and self._is_float(dtype),
            mapped=not machine.gpus and self.same and self._is_float(dtype) and (not kernel or streams == "stored"),
            context=self.context,
        )

    def _is_float(self, dtype: str) -> bool:
        """Whether floats keep their type: others are another copy."""
        return self.stored.scheme != "none" or self.stored.float_type == dtype

    def plan(self) -> LoadPlan:
        """The plan, with what the user should know."""
        plan = self._place()
        stored, options, told = self.stored, self.options, list(plan.notices)
        if stored.scheme == plan.scheme == "none" and stored.float_type is None and options.dtype == "auto":
            told.append(f"the files hold {stored.dtype} weights, which become {plan.format}; --dtype chooses another")
        if plan.streamed and options.offload == "auto":
            told.append(f"the experts do not fit into memory and are read when they are needed; {kept(plan)}")
        return replace(plan, notices=tuple(told))

    def _place(self) -> LoadPlan:
        parts, machine, offload = self.parts, self.machine, self.options.offload
        if not isinstance(self.options.device_map, str):
            return self._given(self.options.device_map)
        if machine.gpus and offload in ("auto", "none"):
            return self._spread()
        home = machine.gpus[0] if machine.gpus else machine.cpu
        n, kv = parts.n_layers, parts.n_layers * parts.kv * capacity(self.context)
        dense = parts.embedding + parts.head + n * parts.dense
        left = home.memory - parts.buffers - dense - kv
        used = {home.name: kv}
        on_cpu = home is machine.cpu
        if on_cpu and offload != "disk":
            fits = left >= n * parts.experts
            if not fits and offload == "auto":
                return self._stream(home, dense, left, "disk")
            # Pages of a file give way, unless the user says how much there may be.
            gives_way = self.nothing.mapped and left > 0 and "cpu" not in (self.options.max_memory or {})
            if not fits and not gives_way:
                return replace(self.nothing, fault=too_large(parts.total, self.layout.name))
            note = () if fits else ("not all weights find room in memory: what gave way is read from the disk again",)
            weights = {"cpu": dense + min(n * parts.experts, left)}
            return replace(self._laid_out((Layer("cpu", "cpu"),) * n), weights=weights, kv=used, notices=note)
        if offload == "cpu" and machine.cpu.memory < n * parts.experts:
            return replace(self.nothing, fault=too_large(parts.total, self.layout.name))
        return self._stream(home, dense, left, offload)

    def _laid_out(self, layers: tuple[Layer, ...]) -> LoadPlan:
        """With the layers in their places, and a map of the modules."""
        first, last = layers[0].device, layers[-1].device
        blocks = {f"transformer.blocks.{i}": layer.device for i, layer in enumerate(layers)}
        places = {"transformer.wte": first, **blocks, "transformer.norm_f": last, "lm_head": last}
        return replace(self.nothing, layers=layers, device_map=places)

    def _stream(self, home: Device, dense: int, left: int, away: str) -> LoadPlan:
        """All layers on one device, their experts elsewhere, as many as find room beside it."""
        parts, n, wanted = self.parts, self.parts.n_layers, self.options.expert_cache
        slot = self.stored.slot or _stored_bytes(self.config, self.stored)
        streams = self.nothing.kernel.streams if self.nothing.kernel else "cast"
        if streams == "packed" or not self.same:
            overhead, each = READING_AHEAD * slot, parts.expert
        else:
            is_cast = streams == "cast" and self.stored.float_type != self.layout.name
            overhead, each = parts.expert * is_cast, slot
        budget = int(CACHE_SHARE * left) if wanted is None else wanted
        count = min(n * parts.n_experts, (budget - overhead) // each)
        if wanted is not None and wanted > left:
            return replace(self.nothing, fault=_not_free(wanted, max(0, left)))
        if count < 2:
            needed, limited = overhead + 2 * each, self.options.max_memory is not None
            fault = _too_little(wanted, needed, parts.total, self.layout.name, limited)
            return replace(self.nothing, fault=fault)
        weights = {home.name: dense} | ({"cpu": n * parts.experts} if away == "cpu" else {})
        return replace(
            self._laid_out((Layer(home.name, away),) * n),
            mapped=False,
            chunk=STREAMED_CHUNK,
            weights=weights,
            kv={home.name: n * parts.kv * capacity(self.context)},
            kept=count,
            cache=min(budget, overhead + count * each),
        )

    def _spread(self) -> LoadPlan:
        """Whole layers over the GPUs, in order, even by what is left free; those that do not fit in the CPU's memory.

        A layer that comes from there needs room for itself on the first GPU, which computes it and keeps its keys and
        values. With "sequential" a GPU is filled before the next one gets a layer.
        """
        parts, machine = self.parts, self.machine
        kv, block = parts.kv * capacity(self.context), parts.dense + parts.experts
        refused = too_large(parts.total, self.layout.name)
        packed = self.nothing.kernel is not None  # on one GPU, of which no layer can be elsewhere
        fault = replace(self.nothing, fault=ResourceError(refused.message, ON_THE_CPU) if packed else refused)
        # A GPU that holds not even one layer beside its ends is left alone.
        least = parts.buffers + parts.embedding + parts.head + block + parts.n_layers * kv
        gpus = [gpu for gpu in machine.gpus if gpu.memory >= least]
        if not gpus:
            return fault
        evenly = self.options.device_map != "sequential"
        first, last = gpus[0].name, gpus[-1].name
        rooms = {gpu.name: gpu.memory - parts.buffers for gpu in gpus}
        rooms[first] -= parts.embedding
        whole = dict(rooms)
        whole[last] -= parts.head
        counts = _fill(whole, block + kv, parts.n_layers, evenly)
        waiting = parts.n_layers - sum(counts.values())
        if waiting:
            if packed or self.options.device_map not in AUTOMATIC:
                return fault
            rooms[first] -= block + parts.n_layers * kv
            counts = _fill(rooms, block + kv, parts.n_layers, evenly)
            waiting = parts.n_layers - sum(counts.values())
            last = "cpu"
            if waiting * block + parts.head > machine.cpu.memory:
                return fault
        layers = [Layer(gpu.name, gpu.name) for gpu in gpus for _ in range(counts[gpu.name])]
        plan = self._laid_out((*layers, *[Layer("cpu", "cpu")] * waiting))
        weights = {name: count * block for name, count in counts.items()}
        weights |= {"cpu": waiting * block} if waiting else {}
        weights[first] += parts.embedding
        last = plan.layers[-1].device
        weights[last] = weights.get(last, 0) + parts.head
        used = {name: count * kv for name, count in counts.items()}
        used[first] += waiting * kv
        return replace(plan, weights=weights, kv=used)

    def _given(self, device_map: Mapping[str, Any]) -> LoadPlan:
        """Modules where the user wants them, whether they fit or not."""
        if self.options.offload in ("cpu", "disk"):
            devices = sorted({str(place) for place in device_map.values()})
            if len(devices) > 1:
                listed = ", ".join(devices)
                fault = f"streamed experts compute on one device, not on {listed}"
                raise ModelError(fault, "give --device-map one device")
            options = replace(self.options, device_map=_named(next(iter(device_map.values()))))
            machine = _computing(self.machine, options.device_map)
            return _Planner(self.config, self.stored, machine, options, self.nothing.scheme).plan()
        where = [_place_of(f"transformer.blocks.{i}.norm_attn_norm", device_map) for i in range(self.parts.n_layers)]
        layers = tuple(Layer(device, device) for device in where)
        return replace(self.nothing, layers=layers, device_map=dict(device_map))


def _named(place: Any) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)


def _place_of(module: str, device_map: Mapping[str, Any]) -> str:
    """The device of the longest name in the map that the module's begins with."""
    names = [name for name in device_map if not name or module == name or module.startswith(name + ".")]
    return _named(device_map[max(names, key=len)]) if names else "cpu"


def _stored_bytes(config: DbrxConfig, stored: Stored) -> int:
    """Bytes of an expert in its files, where they are not here to be asked."""
    form = format_of(stored.scheme, stored.group) if stored.scheme != "none" else Format.floats("bfloat16")
    return sizes(config, form).expert


def _fill(rooms: Mapping[str, int], each: int, most: int, evenly: bool) -> dict[str, int]:
    """How many things of one size go to each place, up to so many in all: to the emptiest, or the first with room."""
    counts = dict.fromkeys(rooms, 0)
    for _ in range(most):
        open_ = [name for name in rooms if rooms[name] >= (counts[name] + 1) * each]
        if not open_:
            break
        counts[max(open_, key=lambda name: rooms[name] - counts[name] * each) if evenly else open_[0]] += 1
    return counts


def kept(plan: LoadPlan) -> str:
    """How many of the streamed experts are held, in words."""
    n, experts = plan.sizes.n_layers, plan.sizes.n_experts
    return f"{plan.kept} of {n * experts} are kept at a time, {plan.kept / n:.3g} of {experts} a layer"


def _not_free(wanted: int, free: int) -> ResourceError:
    return ResourceError(
        f"--expert-cache asks for {wanted / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free beside the rest",
        "give less, or leave it out",
    )


def _too_little(wanted: int | None, needed: int, total: int, form: str, limited: bool) -> ResourceError:
    """The cache holds fewer than two experts: one that computes, and the next one on its way."""
    if wanted is not None:
        return ResourceError(
            f"--expert-cache {wanted / 1e9:.1f} GB is too small for two experts of this model",
            f"give at least {-(-needed // 2**20)}MiB",
        )
    return ResourceError(
        f"the weights take {total / 1e9:.1f} GB in {form}, and {needed / 1e9:.1f} GB for two experts of this model "
        "are not free beside the rest",
        f"{'raise --max-memory' if limited else 'free memory'}, or see `dbrx plan` for what fits",
    )
