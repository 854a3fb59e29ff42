"""Where everything lies: the layers on devices, the experts beside them or elsewhere. Arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .errors import ResourceError
from .expert_use import known, least_used, shares
from .load_plan import ARRIVING, AUTOMATIC, LoadOptions, LoadPlan, Stored
from .placement import Device, Layer, capacity, place_of

CACHE_SHARE = 0.75  # of the memory that is left: what streamed experts get, unless the user says how much
READING_AHEAD = 4  # slots that are read to, where experts are then packed into memory of their own
STREAMED_CHUNK = 2048  # tokens a step of prefill: it reads nearly all experts of each layer, however few its tokens are
ON_THE_CPU = "give --device-map cpu, or see `dbrx plan` for what fits"
FROM_THE_DISK = "read the experts from the disk as they are needed (--offload disk), or see `dbrx plan` for what fits"
MORE_RANKS = "start more ranks (torchrun --nproc-per-node), or see `dbrx plan` for what fits in one process"


def lay_out(plan: LoadPlan, stored: Stored, options: LoadOptions) -> LoadPlan:
    """A plan whose form is decided, with everything in its place; with a `fault` where there is no room."""
    if not isinstance(options.device_map, str):
        return _given(plan, options.device_map)
    if not plan.machine.gpus:
        return _on_the_cpu(plan, stored, options)
    if plan.kernel is not None:
        return _beside(plan, options)
    if options.offload in ("auto", "none"):
        return _spread(plan, options)
    if options.offload == "cpu" and plan.machine.cpu.memory < plan.sizes.n_layers * plan.sizes.experts:
        return replace(plan, fault=_too_large(plan, options))
    return _stream(plan, stored, options, plan.machine.gpus[0], options.offload)


def _on_the_cpu(plan: LoadPlan, stored: Stored, options: LoadOptions) -> LoadPlan:
    """All in memory; the experts on the disk where that is asked for, or is allowed and needed."""
    parts, cpu = plan.sizes, plan.machine.cpu
    experts, left = parts.n_layers * parts.experts, _left(plan, cpu)
    fits = left >= experts
    if options.offload == "disk" or (options.offload == "auto" and not fits):
        return _stream(plan, stored, options, cpu, "disk")
    # Pages of a file give way, unless the user says how much there may be.
    gives_way = plan.mapped and left > 0 and "cpu" not in (options.max_memory or {})
    if not fits and not gives_way:
        return replace(plan, fault=_too_large(plan, options))
    note = () if fits else ("not all weights find room in memory: what gave way is read from the disk again",)
    return replace(
        _placed(plan, (Layer("cpu", "cpu"),) * parts.n_layers),
        weights={"cpu": parts.total - experts + min(experts, left)},
        kv={"cpu": _kv(plan)},
        notices=note,
    )


def _kv(plan: LoadPlan) -> int:
    """Bytes of keys and values of all layers."""
    return plan.sizes.n_layers * plan.sizes.kv * capacity(plan.context)


def _left(plan: LoadPlan, home: Device) -> int:
    """Bytes that a device has for experts, beside all else of the network, its keys and values and its buffers."""
    parts = plan.sizes
    return home.memory - parts.buffers - (parts.total - parts.n_layers * parts.experts) - _kv(plan)


def _stream(plan: LoadPlan, stored: Stored, options: LoadOptions, home: Device, away: str) -> LoadPlan:
    """All layers on one device, their experts elsewhere, as many as find room beside it."""
    parts, n, wanted, left = plan.sizes, plan.sizes.n_layers, options.expert_cache, _left(plan, home)
    assert stored.slot is not None
    streams = plan.kernel.streams if plan.kernel else "cast"
    if streams == "packed" or not stored.holds(plan.scheme):
        overhead, each = READING_AHEAD * stored.slot, parts.expert
    else:
        is_cast = streams == "cast" and stored.float_type != plan.format
        overhead, each = parts.expert * is_cast, stored.slot
    budget = int(CACHE_SHARE * left) if wanted is None else wanted
    count = min(n * parts.n_experts, (budget - overhead) // each)
    if wanted is not None and wanted > left:
        return replace(plan, fault=_not_free(wanted, max(0, left)))
    if count < 2:
        return replace(plan, fault=_too_little(plan, wanted, overhead + 2 * each, options.max_memory is not None))
    waiting = {"cpu": n * parts.experts} if away == "cpu" else {}
    return replace(
        _placed(plan, (Layer(home.name, away),) * n),
        mapped=False,
        chunk=STREAMED_CHUNK,
        weights={home.name: parts.total - n * parts.experts} | waiting,
        kv={home.name: _kv(plan)},
        kept=count,
        cache=min(budget, overhead + count * each),
    )


def _beside(plan: LoadPlan, options: LoadOptions) -> LoadPlan:
    """All on GPUs but the experts that find no room: as few GPUs as leave the fewest of them to the CPU.

    With "balanced" on all GPUs.
    """
    largest = sorted(plan.machine.gpus, key=lambda gpu: -gpu.memory)
    fewest = len(largest) if options.device_map == "balanced" else 1
    some = (largest[:count] for count in range(fewest, len(largest) + 1))
    tried = [_over(plan, [gpu for gpu in plan.machine.gpus if gpu in each], options) for each in some]
    return min((each for each in tried if each.runs), key=lambda each: each.on_cpu, default=tried[-1])


def _over(plan: LoadPlan, gpus: list[Device], options: LoadOptions) -> LoadPlan:
    """Whole layers over these GPUs, in order; the experts that find no room there with the CPU, as many of each layer.

    With "sequential" a GPU is filled before the next one gets a layer, where all find room.

    A prompt is read in longer steps than on a CPU, unless all would have room but for these: weights become floats in
    each step, or come over the bus.
    """
    parts, n, first, last = plan.sizes, plan.sizes.n_layers, gpus[0].name, gpus[-1].name
    beside = parts.dense + parts.kv * capacity(plan.context)
    ends = dict.fromkeys((gpu.name for gpu in gpus), 0)
    ends[first] += parts.embedding
    ends[last] += parts.head
    each, away = beside + parts.experts, dict.fromkeys(ends, 0)

    def room(plan: LoadPlan) -> dict[str, int]:
        return {gpu.name: gpu.memory - plan.sizes.buffers - ends[gpu.name] for gpu in gpus}

    steps = _longer(plan), plan
    for plan in steps:
        rooms = room(plan)
        counts = _fill(rooms, each, n, evenly=options.device_map != "sequential")
        if sum(counts.values()) == n:
            break
    else:
        plan = steps[0]
        rooms = room(plan)
        # In shares of their room: of layers a little smaller than that all find some.
        counts = _fill(rooms, max(1, sum(rooms.values()) // (n + len(gpus))), n, evenly=True)
        for name, count in counts.items():
            short = count * parts.n_experts - (rooms[name] - count * beside) // parts.expert
            away[name] = min(count * parts.n_experts, short + ARRIVING) if short > 0 else 0
    waiting = sum(away.values()) * parts.expert
    plan = replace(plan, machine=replace(plan.machine, gpus=tuple(gpus)))
    needed = {name: counts[name] * beside + ARRIVING * parts.expert * (away[name] > 0) for name in rooms}
    too_small = min(counts.values()) == 0 or any(room < needed[name] for name, room in rooms.items())
    too_small |= waiting > plan.machine.cpu.memory
    if too_small or (waiting and options.offload == "none"):
        hint = ON_THE_CPU if too_small else f"have the CPU compute the others (--offload auto), or {ON_THE_CPU}"
        return replace(plan, fault=_too_large(plan, options, hint))
    # 10 experts of 4 layers are away: 3, 3, 2, 2.
    split = [(name, -(-(away[name] - i) // count)) for name, count in counts.items() for i in range(count)]
    use = known(options.use, n, parts.n_experts)
    layers = tuple(_by_use(*each, counted) for each, counted in zip(split, use, strict=True))
    weights = {name: count * (parts.dense + parts.experts) for name, count in counts.items()}
    weights = {name: held + ends[name] - away[name] * parts.expert for name, held in weights.items()}
    return replace(
        _placed(plan, layers),
        use=use,
        weights=weights | ({"cpu": waiting} if waiting else {}),
        kv={name: count * parts.kv * capacity(plan.context) for name, count in counts.items()},
    )


def _longer(plan: LoadPlan) -> LoadPlan:
    """With longer steps of prefill."""
    times = STREAMED_CHUNK // plan.chunk
    return replace(plan, sizes=replace(plan.sizes, buffers=times * plan.sizes.buffers), chunk=times * plan.chunk)


def _by_use(device: str, on_cpu: int, counts: Sequence[int]) -> Layer:
    """A layer on a GPU that leaves so many experts to the CPU."""
    away, falls = least_used(counts, on_cpu), shares(counts)
    return Layer(device, device, away, sum(falls[expert] for expert in away))


def _spread(plan: LoadPlan, options: LoadOptions) -> LoadPlan:
    """Whole layers over the GPUs, in order, even by what is left free; those that do not fit in the CPU's memory.

    A layer that comes from there needs room for itself on the first GPU, which computes it and keeps its keys and
    values. With "sequential" a GPU is filled before the next one gets a layer.
    """
    parts, machine = plan.sizes, plan.machine
    kv, block = parts.kv * capacity(plan.context), parts.dense + parts.experts
    fault = replace(plan, fault=_too_large(plan, options))
    # A GPU that holds not even one layer beside its ends is left alone.
    least = parts.buffers + parts.embedding + parts.head + block + parts.n_layers * kv
    gpus = [gpu for gpu in machine.gpus if gpu.memory >= least]
    if not gpus:
        return fault
    evenly = options.device_map != "sequential"
    first, last = gpus[0].name, gpus[-1].name
    rooms = {gpu.name: gpu.memory - parts.buffers for gpu in gpus}
    rooms[first] -= parts.embedding
    whole = dict(rooms)
    whole[last] -= parts.head
    counts = _fill(whole, block + kv, parts.n_layers, evenly)
    waiting = parts.n_layers - sum(counts.values())
    if waiting:
        if options.device_map not in AUTOMATIC:
            return fault
        rooms[first] -= block + parts.n_layers * kv
        counts = _fill(rooms, block + kv, parts.n_layers, evenly)
        if not counts[first]:  # it has room for a layer that comes and none that stays
            return _spread(replace(plan, machine=replace(machine, gpus=tuple(gpus[1:]))), options)
        waiting = parts.n_layers - sum(counts.values())
        last = "cpu"
        if waiting * block + parts.head > machine.cpu.memory:
            return fault
    layers = [Layer(gpu.name, gpu.name) for gpu in gpus for _ in range(counts[gpu.name])]
    plan = _placed(plan, (*layers, *[Layer("cpu", "cpu")] * waiting))
    weights = {name: count * block for name, count in counts.items()}
    weights |= {"cpu": waiting * block} if waiting else {}
    weights[first] += parts.embedding
    last = plan.layers[-1].device
    weights[last] = weights.get(last, 0) + parts.head
    used = {name: count * kv for name, count in counts.items()}
    used[first] += waiting * kv
    return replace(plan, weights=weights, kv=used)


def _given(plan: LoadPlan, device_map: Mapping[str, Any]) -> LoadPlan:
    """Modules where the user wants them, whether they fit or not."""
    found = (place_of(f"transformer.blocks.{i}.norm_attn_norm", device_map) for i in range(plan.sizes.n_layers))
    where = ["cpu" if place is None else device_name(place) for place in found]
    return replace(plan, layers=tuple(Layer(device, device) for device in where), device_map=dict(device_map))


def _placed(plan: LoadPlan, layers: tuple[Layer, ...]) -> LoadPlan:
    """With the layers in their places, and a map of the modules."""
    first, last = layers[0].device, layers[-1].device
    blocks = {f"transformer.blocks.{i}": layer.device for i, layer in enumerate(layers)}
    places = {"transformer.wte": first, **blocks, "transformer.norm_f": last, "lm_head": last}
    return replace(plan, layers=layers, device_map=places)


def device_name(place: Any) -> str:
    """Of a device map's value: numbers are those of GPUs."""
    return f"cuda:{place}" if isinstance(place, int) else str(place)


def _fill(rooms: Mapping[str, int], each: int, most: int, evenly: bool) -> dict[str, int]:
    """How many things of one size go to each place, up to so many in all: to the emptiest, or the first with room."""
    counts = dict.fromkeys(rooms, 0)
    for _ in range(most):
        open_ = [name for name in rooms if rooms[name] >= (counts[name] + 1) * each]
        if not open_:
            break
        counts[max(open_, key=lambda name: rooms[name] - counts[name] * each) if evenly else open_[0]] += 1
    return counts


def _too_large(plan: LoadPlan, options: LoadOptions, hint: str = FROM_THE_DISK) -> ResourceError:
    """The weights find no room. Ranks of a torchrun have neither --offload nor --device-map."""
    split = options.ranks > 1
    return ResourceError(
        f"the weights {'of a rank ' * split}take {plan.sizes.total / 1e9:.1f} GB in {plan.format}, "
        f"more than the memory that is free{' within --max-memory' * bool(options.max_memory)}",
        MORE_RANKS if split else hint,
    )


def _not_free(wanted: int, free: int) -> ResourceError:
    return ResourceError(
        f"--expert-cache asks for {wanted / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free beside the rest",
        "give less, or leave it out",
    )


def _too_little(plan: LoadPlan, wanted: int | None, needed: int, limited: bool) -> ResourceError:
    """The cache holds fewer than two experts: one that computes, and the next one on its way."""
    if wanted is not None:
        return ResourceError(
            f"--expert-cache {wanted / 1e9:.1f} GB is too small for two experts of this model",
            f"give at least {-(-needed // 2**20)}MiB",
        )
    return ResourceError(
        f"the weights take {plan.sizes.total / 1e9:.1f} GB in {plan.format}, and {needed / 1e9:.1f} GB for two experts "
        "of this model are not free beside the rest",
        f"{'raise --max-memory' if limited else 'free memory'}, or see `dbrx plan` for what fits",
    )
