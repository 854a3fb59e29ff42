"""What is laid out, and where: the bytes of a network's parts in a format, and a machine. Imports without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

from .config import DbrxConfig
from .quantization import DENSE, SCHEMES

PREFILL_CHUNK = 512  # tokens a step of prefill: enough for full matrix speed, few enough for Ctrl-C and memory
KV_BLOCK = 256  # tokens of a block of keys and values; 40 MiB of DBRX in bfloat16, and what flash-attn's kernels want
FLOAT_BYTES: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "float16": 2, "float32": 4})


@dataclass(frozen=True)
class Format:
    """Bytes a weight, scales included."""

    name: str
    experts: float
    linear: float  # attention's projections and the head
    rest: float  # embedding, router, norms, where they are not told apart
    kept_as: str = "none"  # a scheme in `KEPT`, where another program packed them so

    @classmethod
    def floats(cls, dtype: str) -> Format:
        """All in one float type."""
        size = FLOAT_BYTES[dtype]
        return cls(dtype, size, size, size)


def format_of(scheme: str, group: int | None = None) -> Format:
    """Of a scheme: experts in it, attention and head in `DENSE`. The name tells a group that is not the usual one."""
    groups = SCHEMES[scheme].groups
    name = f"{scheme}-g{group}" if groups and group not in (None, groups[0]) else scheme
    return Format(name, SCHEMES[scheme].bytes_per_weight(group or 0), SCHEMES[DENSE].bytes_per_weight(), 2)


FORMATS = {dtype: Format.floats(dtype) for dtype in FLOAT_BYTES} | {
    form.name: form
    for scheme in SCHEMES
    for group in SCHEMES[scheme].groups or (0,)
    for form in [format_of(scheme, group)]
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


def sizes(
    config: DbrxConfig,
    format: Format,
    activation: int | None = None,
    kv: int | None = None,
    embedding: float | None = None,
) -> Sizes:
    """Bytes of a network's parts.

    `format.rest`, if not given: bytes of an activation (and a norm's or router's weight), of a number in the KV cache,
    of one in the embedding.
    """
    d, ffn = config.d_model, config.ffn_config
    kv_size = config.attn_config.kv_n_heads * config.head_dim
    activation = activation or round(format.rest)
    widest = max(config.d_model + 2 * kv_size, 3 * ffn.ffn_hidden_size)
    return Sizes(
        embedding=round(config.vocab_size * d * (embedding or format.rest)),
        head=round(config.vocab_size * d * format.linear) + d * activation,
        dense=round((2 * d + 2 * kv_size) * d * format.linear) + (ffn.moe_num_experts + 2) * d * activation,
        expert=round(3 * ffn.ffn_hidden_size * d * format.experts),
        n_layers=config.n_layers,
        n_experts=ffn.moe_num_experts,
        top_k=ffn.moe_top_k,
        kv=2 * kv_size * (kv or round(format.rest)),
        # The residual stream and its copies, the widest intermediate result in float32, one row of logits.
        buffers=PREFILL_CHUNK * (6 * d * activation + 4 * widest) + 4 * config.vocab_size,
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


class KernelFacts(NamedTuple):
    """What a plan asks of the kernels that hold weights of one form."""

    name: str  # as people read it
    dtype: str  # of the activations
    # How experts that are streamed are computed with: as stored, as floats cast at each use, or packed as they come.
    streams: Literal["stored", "cast", "packed"]


def native_kernel(form: str, group: int | None, stored: str) -> KernelFacts | None:
    """The kernel of a machine that is not here: that of the native library."""
    return None if form == "float16" else KernelFacts("native", "float32", "stored")


def triton_kernel(form: str, group: int | None, device: str) -> KernelFacts | None:
    """The kernel of a GPU that is not here: Triton's, of any form but the other float types."""
    return KernelFacts("triton", "bfloat16", "packed") if form == "bfloat16" or form not in FLOAT_BYTES else None


@dataclass(frozen=True)
class Machine:
    """Where a model can go. A disk's bandwidth is that of reading files."""

    gpus: tuple[Device, ...]
    cpu: Device
    disk: Device
    # The kernel for a form (a float type or a scheme), with a group, of weights that are stored in a scheme or none.
    kernel: Callable[[str, int | None, str], KernelFacts | None] = native_kernel
    # The same on a GPU, by its name.
    card: Callable[[str, int | None, str], KernelFacts | None] = triton_kernel


Place = TypeVar("Place")


def place_of(module: str, places: Mapping[str, Place]) -> Place | None:
    """What a map of modules has for one, by the longest of its names that the module's begins with; None for none."""
    names = [name for name in places if not name or module == name or module.startswith(name + ".")]
    return places[max(names, key=len)] if names else None


def capacity(tokens: int) -> int:
    """Tokens that the blocks of keys and values hold, of which so many have room."""
    return -(-max(1, tokens) // KV_BLOCK) * KV_BLOCK


@dataclass(frozen=True)
class Layer:
    """Where one layer lies: attention and norms on `device`; its experts there, or on "cpu" or "disk" beside a cache.

    Beside GPUs, a whole layer on the "cpu" comes to the first GPU each time that it runs. Of the experts on a GPU those
    that are `away` lie in the CPU's memory instead, and are computed there.
    """

    device: str
    experts: str
    away: tuple[int, ...] = ()
    cpu_share: float = 0.0  # of what a token chooses, what falls on those that are away

    @property
    def on_cpu(self) -> int:
        """How many are away."""
        return len(self.away)
