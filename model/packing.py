"""Weights that are packed for kernels while they are read: matrix by matrix, never twice in memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice, product
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .errors import ModelError
from .experts import Bus, Crossing, HybridExperts, PackedExperts, packed_expert
from .formats.quantized import QuantizedWeights
from .kernels import GluExpertKernel, LinearKernel, Packed, PackedLinear, choose, experts_of
from .kernels.native_kept import NativeKept
from .parallel import ShardedWeights
from .placement import place_of
from .quantization import DENSE, KEPT, SCHEMES
from .safetensors_file import damaged
from .staging import Staging, staged
from .streaming.slots import Slot
from .streaming.source import data_in
from .weights import KeptWeights

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM
    from .load_plan import LoadPlan
    from .transformer import DbrxBlock
    from .weights import Extent, Weights

UNDER_WAY = 0.1  # of the packed weights' size: what experts that are being packed may take beside
MOST_ON_CARD = 2  # experts whose floats lie there at the same time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SMALL, LARGE = 2**16, 2**25  # bytes that are mapped by themselves; the larger is the most that glibc takes
SPARE = 2**27  # bytes that may stay free at the end of the heap


class KernelChoice(NamedTuple):
    """The kernels of a network: one for the experts, one for attention and head."""

    quantize: str  # none, one of `KEPT`, or a key of `SCHEMES`
    experts: GluExpertKernel
    dense: LinearKernel
    kv_dtype: torch.dtype | None = None  # of the cached keys and values, where not the activations'
    on_cpu: GluExpertKernel | None = None  # of experts that the CPU computes beside a card
    converts: bool = False  # floats become what `quantize` says as they are read

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: float32, but for torch's products with bfloat16 weights."""
        return self.dense.dtype

    @property
    def name(self) -> str:
        """In words: what `bench` and `doctor` show."""
        names = list(dict.fromkeys((self.experts.name, self.dense.name)))
        return " + ".join([*names, *([f"{self.on_cpu.name} on the CPU"] if self.on_cpu else [])])


def kernels_of(plan: LoadPlan, weights: Weights) -> dict[str, KernelChoice]:
    """The kernels that a plan packs weights for, by device; none where they are computed with as tensors."""
    places = dict.fromkeys(layer.device for layer in plan.layers)
    return {place: _kernels_on(place, plan, weights) for place in places} if plan.kernel else {}


def _kernels_on(place: str, plan: LoadPlan, weights: Weights) -> KernelChoice:
    activation = str(weights.config.ffn_config.activation)
    dense: LinearKernel | None
    experts: LinearKernel | None
    beside: LinearKernel | None = None
    if plan.scheme == "none":
        dense = experts = choose(plan.format, None, torch.device(place))
    elif plan.scheme in KEPT and weights.kept is not None:
        dense, experts = (NativeKept(plan.scheme, part) for part in (weights.kept.linear, weights.kept.experts))
    else:
        kept = plan.scheme == weights.quantization and SCHEMES[plan.scheme].groups
        device = torch.device(place)
        group = weights.group if kept else None
        dense, experts = choose(DENSE, None, device), choose(plan.scheme, group, device)
        beside = choose(plan.scheme, group) if plan.on_cpu else None
    assert experts is not None and dense is not None  # the plan asked the same
    kv_dtype = getattr(torch, plan.kv_dtype)
    return KernelChoice(
        plan.scheme,
        experts_of(experts, activation),
        dense,
        kv_dtype=kv_dtype if kv_dtype != dense.dtype else None,
        on_cpu=experts_of(beside, activation) if beside else None,
        converts=plan.converts,
    )


def strip_dense(network: DbrxForCausalLM) -> None:
    """Leave the matrices of attention and head out of a network, before it is placed and read."""
    for module, name, _ in _dense(network):
        setattr(module, name, nn.Identity())


def pack_into(
    network: DbrxForCausalLM,
    weights: Weights,
    kernels: Mapping[str, KernelChoice],
    advance: Callable[[int], None],
    plan: LoadPlan,
) -> None:
    """Give a network the packed matrices of attention and head, and of the experts if they are not streamed.

    Each for the kernels of the device where the plan has it.

    Read and packed on as many threads as compute, a matrix or an expert each; `advance` hears bytes as they are stored.
    What a kernel reads as it is stored stays in the mapped file, uncopied, so processes share it.
    """
    ffn = weights.config.ffn_config
    every: list[list[Packed]] = [[()] * ffn.moe_num_experts for _ in range(weights.config.n_layers)]
    ranks = weights.ranks.size if isinstance(weights, ShardedWeights) else 1
    first = next(iter(kernels.values()))  # what is asked below is the same on every device
    mapped = ranks > 1 or reads_mapped(first.experts, weights)
    exact = torch.float32 if plan.format == "float32" else None

    def matrix(module: nn.Module, attribute: str, name: str) -> int:
        kernel = kernels[str(place_of(name, plan.device_map))].dense
        packed = _pack_dense(weights, kernel, name, exact)
        setattr(module, attribute, PackedLinear(kernel, packed, last=module is network))
        if not mapped:
            weights.give_back()  # each at once: all of them together would be in memory twice
        return weights.nbytes_of(name)

    def expert(layer: int, i: int) -> int:
        choice = kernels[plan.layers[layer].device]
        kernel = choice.on_cpu if i in plan.layers[layer].away else choice.experts
        assert kernel is not None
        if staging is not None and kernel is choice.experts:
            with staging.buffer(choice.dense.device) as buffer:
                every[layer][i] = packed_expert(kernel, weights, layer, i, read_expert(weights, layer, i, buffer))
        else:
            data = None if ranks > 1 or reads_mapped(kernel, weights) else read_expert(weights, layer, i)
            every[layer][i] = packed_expert(kernel, weights, layer, i, data)
        return sum(extent.nbytes for extent in weights.expert_extents(layer, i)) // ranks

    jobs = [partial(matrix, *place) for place in _dense(network)][::-1]  # the head first: it is the largest
    if not plan.streamed:
        jobs += [partial(expert, layer, i) for layer, held in enumerate(every) for i in range(len(held))]
    # A dense matrix counts as an expert: there are few.
    size = len(jobs) * first.experts.nbytes(ffn.ffn_hidden_size, weights.config.d_model, 2)
    most = MOST_ON_CARD if first.dense.device.type == "cuda" else len(jobs)
    count = min(most, at_once(weights, int(size * UNDER_WAY)))
    with freed_at_once(), _staged(weights, first) as staging, threads(count) as pool:
        for done in as_completed([pool.submit(job) for job in jobs]):
            advance(done.result())
    if not plan.streamed:
        bus = network.bus = Bus(plan.use) if first.on_cpu else None
        for i, (block, held, layer) in enumerate(zip(_blocks(network), every, plan.layers, strict=True)):
            block.ffn.experts = _placed(kernels[layer.device], held, layer.away, bus, i)


def _staged(weights: Weights, kernels: KernelChoice) -> AbstractContextManager[Staging | None]:
    """Buffers for experts on their way to a card; ranks read their slices from mapped files."""
    if isinstance(weights, ShardedWeights):
        return nullcontext()
    places = product(range(weights.config.n_layers), range(weights.config.ffn_config.moe_num_experts))
    return staged(MOST_ON_CARD, (weights.expert_extents(*place) for place in places), kernels.dense.device)


def _placed(kernels: KernelChoice, held: list[Packed], away: Sequence[int], bus: Bus | None, layer: int) -> nn.Module:
    """A layer's experts, of which some are away from where all else computes."""
    if not away or bus is None or kernels.on_cpu is None:
        return PackedExperts(kernels.experts, held)
    here: list[Packed] = [() if i in away else packed for i, packed in enumerate(held)]
    there: list[Packed] = [packed if i in away else () for i, packed in enumerate(held)]
    on_card = PackedExperts(kernels.experts, here) if len(away) < len(held) else None
    can_cross = kernels.on_cpu.stored(there[away[0]]) is not None
    crossing = Crossing(kernels.experts, here, kernels.on_cpu, there, bus, bus.used[layer]) if can_cross else None
    return HybridExperts(on_card, PackedExperts(kernels.on_cpu, there), bus, crossing)


def reads_mapped(kernel: GluExpertKernel, weights: Weights) -> bool:
    """Whether a kernel computes with the very bytes of the checkpoint."""
    same = weights.plain_experts if kernel.quantization == "none" else kernel.quantization == weights.quantization
    return kernel.reads_stored and same


def at_once(weights: Weights, room: int) -> int:
    """How many experts may be under way, on a thread each, in `room` bytes of memory; at least one."""
    ffn = weights.config.ffn_config
    floats = 3 * ffn.ffn_hidden_size * weights.config.d_model * 4  # in float32: with all copies, about as much
    return max(1, min(torch.get_num_threads(), room // floats))


def _pack_dense(weights: Weights, kernel: LinearKernel, name: str, dtype: torch.dtype | None) -> tuple[Any, ...]:
    """dtype: of floats that are read out of few bits, bfloat16 unless given."""
    whole = weights.whole if isinstance(weights, ShardedWeights) else weights
    if isinstance(whole, QuantizedWeights) and kernel.quantization == DENSE:
        matrix = whole.quantized_matrix(name)
        return kernel.load(weights.matrix(name, matrix) if isinstance(weights, ShardedWeights) else matrix)
    if isinstance(weights, KeptWeights):
        stored = weights.kept_matrix(name)
        return kernel.load(stored) if stored else kernel.pack(weights.read_exactly(name))
    return kernel.pack(weights.read(name, dtype))


def read_expert(weights: Weights, layer: int, expert: int, to: Slot | None = None) -> tuple[Tensor, ...]:
    """The bytes of an expert's extents, in `to` or in memory of their own: a map would keep the file's pages in use."""
    extents = weights.expert_extents(layer, expert)
    if to is not None:
        parts = data_in(to, extents)
    else:
        parts = tuple(torch.empty(extent.nbytes, dtype=torch.uint8) for extent in extents)
    for extent, part in zip(extents, parts, strict=True):
        _read(extent, part)
    return parts


def _read(extent: Extent, buffer: Tensor) -> None:
    view = memoryview(buffer.numpy().data)
    try:
        fd = os.open(extent.file, os.O_RDONLY)
        try:
            done = 0
            while done < extent.nbytes and (got := os.preadv(fd, [view[done : done + 2**30]], extent.start + done)):
                done += got
        finally:
            os.close(fd)
    except OSError as error:
        raise ModelError(f"{extent.file}: cannot be read: {error.strerror}") from None
    if done < extent.nbytes:
        raise damaged(extent.file, "became shorter while it was in use")


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads that share the cores."""
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(max(1, cores // count),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # what a thread sets reaches MKL in all of them


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Memory goes back to the system when a tensor is freed, for as long as weights are packed.

    Packed experts lie between the floats they were made from: in a heap a model would take twice its size. Activations
    stay in the heap: to give them back and to take them again was 50,000 page faults a prompt of 512 tokens.
    """
    _set_heap(SMALL, SMALL)
    try:
        yield
    finally:
        _set_heap(LARGE, SPARE)


def _set_heap(mapped: int, kept: int) -> None:
    """Tell glibc from what size on it maps memory by itself, and how much it keeps free at the end of its heap."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, mapped)
        mallopt(M_TRIM_THRESHOLD, kept)


def in_order(pool: ThreadPoolExecutor, count: int, make: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """What is made of each job, in order; of `count` jobs at a time, for what waits to be used takes memory too."""
    left = iter(jobs)
    waiting = deque(pool.submit(make, job) for job in islice(left, count))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(make, job) for job in islice(left, 1))
        yield result


def _blocks(network: DbrxForCausalLM) -> Iterator[DbrxBlock]:
    yield from cast("Iterator[DbrxBlock]", network.transformer.blocks)


def _dense(network: DbrxForCausalLM) -> Iterator[tuple[nn.Module, str, str]]:
    """Module, attribute and the weight's full name of each matrix that all tokens pass."""
    for i, block in enumerate(_blocks(network)):
        for name in ("Wqkv", "out_proj"):
            yield block.norm_attn_norm.attn, name, f"transformer.blocks.{i}.norm_attn_norm.attn.{name}.weight"
    yield network, "lm_head", "lm_head.weight"
