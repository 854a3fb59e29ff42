"""Arithmetic of memory and speed: a configuration, a format and a machine in; what lies where and how fast, out.

Imports without torch. Every weight that a token needs is read once. The ceiling takes the full rate of the place where
it lies for that; computing hides behind the reading at batch 1. The prediction takes what kernels are measured to reach
(`rates`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

from .config import DbrxConfig

CHUNK = 512  # tokens that prefill reads at once
CACHE_START = 256  # capacity of an empty KV cache; it grows by doubling
CACHE_SHARE = 0.75  # of the memory that is left: what experts from the disk get, unless the user says how much


@dataclass(frozen=True)
class Format:
    """Bytes a weight, scales included."""

    name: str
    experts: float
    linear: float  # attention's projections and the head
    rest: float  # embedding, router, norms: as the activations


FORMATS = {
    "float32": Format("float32", 4, 4, 4),
    "bfloat16": Format("bfloat16", 2, 2, 2),
    "float16": Format("float16", 2, 2, 2),
    "int8": Format("int8", 1, 1, 2),  # a scale an output channel does not count
    "int4": Format("int4", 0.5 + 4 / 32, 1, 2),  # scale and zero point of 2 bytes each a group of 32
    "int4-g128": Format("int4-g128", 0.5 + 4 / 128, 1, 2),
}


@dataclass(frozen=True)
class Sizes:
    """Bytes of each part of a network in one format."""

    embedding: int
    head: int  # with the last norm
    dense: int  # a layer without its experts
    expert: int
    n_layers: int
    n_experts: int
    top_k: int
    kv: int  # keys and values of a token in one layer
    buffers: int  # activations of one chunk of prefill

    @property
    def experts(self) -> int:
        """All experts of a layer."""
        return self.n_experts * self.expert

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.n_layers * (self.dense + self.experts)

    @property
    def active(self) -> int:
        """Bytes of weights that one token reads: all but the embedding, of which it reads a row."""
        return self.head + self.n_layers * (self.dense + self.top_k * self.expert)


def sizes(config: DbrxConfig, format: Format) -> Sizes:
    """Bytes of a network's parts."""
    d, ffn = config.d_model, config.ffn_config
    kv_size = config.attn_config.kv_n_heads * config.head_dim
    activation = int(format.rest)
    widest = max(config.d_model + 2 * kv_size, 3 * ffn.ffn_hidden_size)
    return Sizes(
        embedding=round(config.vocab_size * d * format.rest),
        head=round(config.vocab_size * d * format.linear + d * format.rest),
        dense=round((2 * d + 2 * kv_size) * d * format.linear + (ffn.moe_num_experts + 2) * d * format.rest),
        expert=round(3 * ffn.ffn_hidden_size * d * format.experts),
        n_layers=config.n_layers,
        n_experts=ffn.moe_num_experts,
        top_k=ffn.moe_top_k,
        kv=2 * kv_size * activation,
        # The residual stream and its copies, the widest intermediate result in float32, one row of logits.
        buffers=CHUNK * (6 * d * activation + 4 * widest) + 4 * config.vocab_size,
    )


def parameters(config: DbrxConfig) -> int:
    """How many numbers the network has."""
    return sizes(config, Format("count", 1, 1, 1)).total


@dataclass(frozen=True)
class Device:
    """A place for weights: usable bytes, and bytes a second at which its processor reads them."""

    name: str
    memory: int
    bandwidth: float
    link: float = 0.0  # of a GPU: bytes a second from the CPU's memory


@dataclass(frozen=True)
class Machine:
    """Where a model can go. A disk's bandwidth is that of reading files."""

    gpus: tuple[Device, ...]
    cpu: Device
    disk: Device


@dataclass(frozen=True)
class Tier:
    """What a token waits for: a kind of reading, its bytes and seconds."""

    what: str
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Rates:
    """What this machine's kernels reach with one token: bytes a second, and seconds."""

    dense: float  # bytes a second: attention and head
    experts: float
    layer: float  # seconds of a layer beside its weights
    arrival: float = 0.0  # seconds a byte: what was read from the disk becomes what is computed with


@dataclass(frozen=True)
class Layer:
    """Where one layer lies: attention and norms on `device`; its experts there, in "cpu" memory, or on "disk"."""

    device: str
    experts: str


@dataclass(frozen=True)
class Placement:
    """What lies where. `layers` is empty if not even the parts that every token needs fit: it does not run."""

    machine: Machine
    sizes: Sizes
    format: str
    context: int
    layers: tuple[Layer, ...]
    weights: Mapping[str, int]  # bytes by device name; the cache of experts from the disk not counted
    kv: Mapping[str, int]
    cache: int  # bytes of CPU memory that hold experts from the disk

    @property
    def runs(self) -> bool:
        return bool(self.layers)

    @property
    def resident(self) -> bool:
        """Whether all weights lie where they are used."""
        return self.runs and all(layer.experts == layer.device for layer in self.layers)

    @property
    def device_map(self) -> dict[str, str]:
        """Module names -> devices, whole layers, as accelerate takes it; experts elsewhere are not in it."""
        if not self.runs:
            return {}
        blocks = {f"transformer.blocks.{i}": layer.device for i, layer in enumerate(self.layers)}
        first, last = self.layers[0].device, self.layers[-1].device
        return {"transformer.wte": first, **blocks, "transformer.norm_f": last, "lm_head": last}

    @property
    def on_disk(self) -> int:
        """Layers whose experts are read from the disk as they are needed."""
        return sum(layer.experts == "disk" for layer in self.layers)

    @property
    def hits(self) -> float:
        """Share of the experts from the disk that the cache holds when routing is uniform: the least it can be."""
        streamed = self.on_disk * self.sizes.experts
        return min(1.0, self.cache / streamed) if streamed else 1.0

    def steps(self) -> Iterator[tuple[Tier, ...]]:
        """What one token of decoding waits for, one step after the other; the tiers of a step pass at the same time."""
        parts, machine = self.sizes, self.machine
        devices = {device.name: device for device in (*machine.gpus, machine.cpu)}
        chosen = parts.top_k * parts.expert

        def tier(what: str, nbytes: float, bandwidth: float) -> Tier:
            return Tier(what, round(nbytes), nbytes / bandwidth)

        for layer in self.layers:
            home = devices[layer.device]
            memory = "CPU memory" if home is machine.cpu else "GPU memory"
            yield (tier(memory, parts.dense, home.bandwidth),)
            if layer.experts != layer.device and home is not machine.cpu:
                experts = tier("CPU memory to GPU", chosen, home.link)
            else:
                experts = tier(memory, chosen, home.bandwidth)
            disk = tier("disk", chosen * (1 - self.hits), machine.disk.bandwidth)
            yield (disk, experts) if layer.experts == "disk" else (experts,)
        if self.runs:  # the head, beside the last layer
            yield (tier(memory, parts.head, home.bandwidth),)

    def tiers(self) -> list[Tier]:
        """What one token of decoding waits for, by place."""
        found: dict[str, Tier] = {}
        for what, nbytes, seconds in (astuple(tier) for step in self.steps() for tier in step):
            before = found.get(what, Tier(what, 0, 0.0))
            found[what] = Tier(what, before.nbytes + nbytes, before.seconds + seconds)
        return [tier for tier in found.values() if tier.nbytes]

    def tokens_per_s(self) -> float:
        """Ceiling of decoding at batch 1."""
        seconds = sum(max(tier.seconds for tier in step) for step in self.steps())
        return 1 / seconds if seconds else 0.0

    def predict(self, rates: Rates) -> float:
        """Tokens a second of decoding at batch 1, at the beginning of a context, where a CPU computes all.

        Experts from the disk compute while others are read: of reading and computing the longer counts, and of the
        shorter one expert's part, in which the other waits.
        """
        parts, chosen = self.sizes, self.sizes.top_k * self.sizes.expert
        missing = chosen * (1 - self.hits)
        seconds = parts.head / rates.dense + len(self.layers) * (parts.dense / rates.dense + rates.layer)
        seconds += (len(self.layers) - self.on_disk) * chosen / rates.experts
        read, compute = missing / self.machine.disk.bandwidth, chosen / rates.experts + missing * rates.arrival
        return 1 / (seconds + self.on_disk * (max(read, compute) + min(read, compute) / parts.top_k))

    def load_s(self) -> float:
        """Seconds until it is ready: all that is resident comes from the disk once."""
        return sum(self.weights.values()) / self.machine.disk.bandwidth

    def free(self, device: Device) -> int:
        """Bytes that a device has left."""
        used = self.weights.get(device.name, 0) + self.kv.get(device.name, 0)
        working = self.sizes.buffers if used else 0
        return device.memory - used - working - (self.cache if device.name == self.machine.cpu.name else 0)

    def largest_context(self, limit: int) -> int:
        """The largest context up to `limit` that this layout has room for; the experts' cache gives way to it."""
        room = limit
        for device in (*self.machine.gpus, self.machine.cpu):
            count = sum(layer.device == device.name for layer in self.layers)
            if count:
                spare = self.free(device) + self.kv.get(device.name, 0)
                spare += self.cache if device.name == self.machine.cpu.name else 0
                room = min(room, _tokens(spare // (count * self.sizes.kv)))
        return room if self.runs else 0


def capacity(tokens: int) -> int:
    """Tokens that the KV cache allots for so many."""
    allotted = CACHE_START
    while allotted < tokens:
        allotted *= 2
    return allotted


def _tokens(allotted: int) -> int:
    """The inverse of `capacity`: the most tokens that fit into so many places."""
    return 1 << (allotted.bit_length() - 1) if allotted >= CACHE_START else 0


def place(
    config: DbrxConfig,
    format: Format,
    machine: Machine,
    context: int,
    *,
    all_on_disk: bool = False,
    expert_cache: int | None = None,
) -> Placement:
    """Lay out a model: layers over the GPUs in order, experts beside them as far as they fit, the rest in CPU memory,
    and what is left on the disk. Without a GPU all is computed on the CPU.

    all_on_disk: the experts, even if they would fit (`--offload disk`). expert_cache: bytes for those on the disk.
    """
    parts = sizes(config, format)
    kv = parts.kv * capacity(context)
    least = parts.buffers + parts.embedding + parts.head + parts.dense + kv
    # A GPU that holds not even one layer beside its ends is left alone.
    homes = tuple(gpu for gpu in machine.gpus if gpu.memory >= least) or (machine.cpu,)
    counts = _spread(parts, kv, homes)
    nothing = Placement(machine, parts, format.name, context, (), {}, {}, 0)
    if counts is None:
        return nothing
    weights: dict[str, int] = {}
    layers: list[Layer] = []
    cpu_room = machine.cpu.memory - parts.buffers
    for device, count, fixed in zip(homes, counts, _fixed(parts, len(homes)), strict=True):
        weights[device.name] = fixed + count * parts.dense
        left = device.memory - parts.buffers - weights[device.name] - count * kv
        beside = 0 if all_on_disk else min(count, left // parts.experts)
        if device is machine.cpu and beside < count:
            beside = 0  # layers that are streamed share one cache; a layer that is not would only take from it
        layers += [Layer(device.name, device.name)] * beside + [Layer(device.name, "")] * (count - beside)
        weights[device.name] += beside * parts.experts
        if device is machine.cpu:
            cpu_room = left - beside * parts.experts
    waiting = sum(not layer.experts for layer in layers)
    fits = not all_on_disk and homes[0] is not machine.cpu and waiting * parts.experts <= cpu_room
    if waiting and not fits and cpu_room < parts.n_experts * parts.expert // 4:
        return nothing  # a few experts must find room, or each read throws out the one before
    elsewhere = "cpu" if fits else "disk"
    layers = [layer if layer.experts else replace(layer, experts=elsewhere) for layer in layers]
    if waiting and fits:
        weights["cpu"] = weights.get("cpu", 0) + waiting * parts.experts
    wanted = int(CACHE_SHARE * cpu_room) if expert_cache is None else min(expert_cache, cpu_room)
    cache = min(wanted, waiting * parts.experts) if waiting and not fits else 0
    used = {device.name: count * kv for device, count in zip(homes, counts, strict=True)}
    return Placement(machine, parts, format.name, context, tuple(layers), weights, used, cache)


def _fixed(parts: Sizes, devices: int) -> Iterator[int]:
    """What lies on each device beside layers: the embedding on the first, the head on the last."""
    for i in range(devices):
        yield (parts.embedding if i == 0 else 0) + (parts.head if i == devices - 1 else 0)


def _spread(parts: Sizes, kv: int, devices: Sequence[Device]) -> list[int] | None:
    """How many layers each device takes, in order, even by what is left free; None if their dense parts do not fit.

    Whole layers if all of them fit; else only the dense parts count, and experts share what remains.
    """
    fixed = list(_fixed(parts, len(devices)))
    rooms = [device.memory - parts.buffers - own for device, own in zip(devices, fixed, strict=True)]
    whole = parts.dense + parts.experts + kv
    for needed in (whole, parts.dense + kv):
        limits = [max(0, room // needed) for room in rooms]
        if sum(limits) < parts.n_layers:
            continue
        counts = [0] * len(devices)
        for _ in range(parts.n_layers):
            open_ones = [i for i, limit in enumerate(limits) if counts[i] < limit]
            counts[max(open_ones, key=lambda i: rooms[i] - counts[i] * whole)] += 1
        return counts
    return None
