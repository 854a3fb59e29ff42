"""Arithmetic of memory and speed: a configuration, a format and a machine in; what lies where and how fast, out.

Imports without torch. Every weight that a token needs is read once. The ceiling takes the full rate of the place where
it lies for that; computing hides behind the reading at batch 1. The prediction takes what kernels are measured to reach
(`rates`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace

from .config import DbrxConfig
from .quantization import DENSE, SCHEMES

CHUNK = 512  # tokens that prefill reads at once
CACHE_START = 256  # capacity of an empty KV cache; it grows by doubling
CACHE_SHARE = 0.75  # of the memory that is left: what experts from elsewhere get, unless the user says how much
# What loading refuses beside a GPU, and a plan with the same options as well: what is wrong, and what to type.
QUANTIZED_ON_GPU = "quantized weights compute on the CPU only", "give --device-map cpu, or leave out --quantize"


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
} | {
    name: Format(name, SCHEMES[scheme].bytes_per_weight(group), SCHEMES[DENSE].bytes_per_weight(), 2)
    for name, scheme, group in (("int8", "int8", 0), ("int4", "int4", 32), ("int4-g128", "int4", 128))
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
    """Where one layer lies: attention and norms on `device`; its experts there, or on "cpu" or "disk" beside a cache.

    Beside GPUs, a whole layer on the "cpu" comes to the first GPU each time that it runs.
    """

    device: str
    experts: str


@dataclass(frozen=True)
class Placement:
    """What lies where. `layers` is empty if it finds no room so: it does not run."""

    machine: Machine
    sizes: Sizes
    format: str
    context: int
    layers: tuple[Layer, ...]
    weights: Mapping[str, int]  # bytes by device name; the cache of experts from elsewhere not counted
    kv: Mapping[str, int]
    cache: int  # bytes of the computing device's memory that hold experts from elsewhere

    @property
    def runs(self) -> bool:
        return bool(self.layers)

    @property
    def resident(self) -> bool:
        """Whether all weights lie where they are used."""
        return self.runs and all(layer.experts == layer.device and not self._comes(layer) for layer in self.layers)

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
    def streamed(self) -> int:
        """Layers whose experts come from elsewhere as they are needed, and stay in a cache."""
        return sum(layer.experts != layer.device for layer in self.layers)

    @property
    def hits(self) -> float:
        """Share of the streamed experts that the cache holds when routing is uniform: the least it can be."""
        streamed = self.streamed * self.sizes.experts
        return min(1.0, self.cache / streamed) if streamed else 1.0

    def _comes(self, layer: Layer) -> bool:
        """Whether a whole layer lies in the CPU's memory and comes to a GPU to run."""
        return layer.device == "cpu" and bool(self.machine.gpus)

    def steps(self) -> Iterator[tuple[Tier, ...]]:
        """What one token of decoding waits for, one step after the other; the tiers of a step pass at the same time."""
        parts, machine = self.sizes, self.machine
        devices = {device.name: device for device in (*machine.gpus, machine.cpu)}
        chosen = parts.top_k * parts.expert
        missing = chosen * (1 - self.hits)

        def tier(what: str, nbytes: float, bandwidth: float) -> Tier:
            return Tier(what, round(nbytes), nbytes / bandwidth)

        def link(nbytes: float) -> Tier:
            return tier("CPU memory to GPU", nbytes, machine.gpus[0].link)

        for layer in self.layers:
            if self._comes(layer):
                yield (link(parts.dense + parts.experts),)
                continue
            home = devices[layer.device]
            memory = "CPU memory" if home is machine.cpu else "GPU memory"
            yield (tier(memory, parts.dense, home.bandwidth),)
            experts = tier(memory, chosen, home.bandwidth)
            if layer.experts == layer.device:
                yield (experts,)
            elif layer.experts == "cpu":
                yield (link(missing), experts)
            else:
                yield (tier("disk", missing, machine.disk.bandwidth), experts)
        if self.runs:  # the head, beside the last layer
            last = self.layers[-1]
            yield (link(parts.head) if self._comes(last) else tier(memory, parts.head, home.bandwidth),)

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
        return device.memory - used - working - self.cache_on(device)

    def cache_on(self, device: Device) -> int:
        """Bytes of a device that hold experts from elsewhere."""
        return self.cache if self.runs and device.name == self.layers[0].device else 0

    def largest_context(self, limit: int) -> int:
        """The largest context up to `limit` that this layout has room for; the experts' cache gives way to it."""
        room = limit
        for device in (*self.machine.gpus, self.machine.cpu):
            used = self.kv.get(device.name, 0)
            if used:
                count = used // (self.sizes.kv * capacity(self.context))
                spare = self.free(device) + used + self.cache_on(device)
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
    offload: str = "auto",
    expert_cache: int | None = None,
) -> Placement:
    """Lay out a model as loading does with the same options.

    Beside GPUs, `offload` "auto" and "none" spread whole layers over them, and leave the rest in the CPU's memory.
    Else one device computes, the first GPU or the CPU: "disk" leaves the experts on the disk, "cpu" in the CPU's
    memory beside a GPU, and "auto" on the disk if they do not fit. expert_cache: bytes for streamed experts.
    """
    parts = sizes(config, format)
    kv = parts.kv * capacity(context)
    nothing = Placement(machine, parts, format.name, context, (), {}, {}, 0)
    if machine.gpus and offload in ("auto", "none"):
        return _spread(nothing, kv) or nothing
    home = machine.gpus[0] if machine.gpus else machine.cpu
    n, dense = parts.n_layers, parts.embedding + parts.head + parts.n_layers * parts.dense
    left = home.memory - parts.buffers - dense - n * kv
    weights, used = {home.name: dense}, {home.name: n * kv}
    if home is machine.cpu and offload != "disk" and left >= n * parts.experts:
        weights[home.name] += n * parts.experts
        return replace(nothing, layers=(Layer(home.name, home.name),) * n, weights=weights, kv=used)
    in_memory = offload == "cpu"
    if offload == "none" or (in_memory and (home is machine.cpu or machine.cpu.memory < n * parts.experts)):
        return nothing
    if left < parts.n_experts * parts.expert // 4:
        return nothing  # a few experts must find room, or each read throws out the one before
    if in_memory:
        weights["cpu"] = n * parts.experts
    away = Layer(home.name, "cpu" if in_memory else "disk")
    wanted = int(CACHE_SHARE * left) if expert_cache is None else min(expert_cache, left)
    cache = min(wanted, n * parts.experts)
    return replace(nothing, layers=(away,) * n, weights=weights, kv=used, cache=cache)


def _spread(nothing: Placement, kv: int) -> Placement | None:
    """Whole layers over the GPUs, in order, even by what is left free; those that do not fit in the CPU's memory.

    None if they do not fit there either. A layer that comes from there needs room for itself on the first GPU, which
    computes it and keeps its keys and values.
    """
    parts, machine = nothing.sizes, nothing.machine
    block = parts.dense + parts.experts
    # A GPU that holds not even one layer beside its ends is left alone.
    least = parts.buffers + parts.embedding + parts.head + block + parts.n_layers * kv
    gpus = [gpu for gpu in machine.gpus if gpu.memory >= least]
    if not gpus:
        return None
    first, last = gpus[0].name, gpus[-1].name
    rooms = {gpu.name: gpu.memory - parts.buffers for gpu in gpus}
    rooms[first] -= parts.embedding
    whole = dict(rooms)
    whole[last] -= parts.head
    counts = _fill(whole, block + kv, parts.n_layers)
    waiting = parts.n_layers - sum(counts.values())
    if waiting:
        rooms[first] -= block + parts.n_layers * kv
        counts = _fill(rooms, block + kv, parts.n_layers)
        waiting = parts.n_layers - sum(counts.values())
        last = "cpu"
        if waiting * block + parts.head > machine.cpu.memory:
            return None
    weights = {name: count * block for name, count in counts.items()} | ({"cpu": waiting * block} if waiting else {})
    weights[first] += parts.embedding
    weights[last] = weights.get(last, 0) + parts.head
    used = {name: count * kv for name, count in counts.items()}
    used[first] += waiting * kv
    layers = [Layer(gpu.name, gpu.name) for gpu in gpus for _ in range(counts[gpu.name])]
    layers += [Layer("cpu", "cpu")] * waiting
    return replace(nothing, layers=tuple(layers), weights=weights, kv=used)


def _fill(rooms: Mapping[str, int], each: int, most: int) -> dict[str, int]:
    """How many things of one size go to each place, up to so many in all, one after the other to the emptiest."""
    counts = dict.fromkeys(rooms, 0)
    for _ in range(most):
        emptiest = max(rooms, key=lambda name: rooms[name] - counts[name] * each)
        if rooms[emptiest] < (counts[emptiest] + 1) * each:
            break
        counts[emptiest] += 1
    return counts
