"""Which kernels there are for a form of weights on a device, in order of preference: the first that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import first_line
from ..placement import KernelFacts
from ..quantization import DENSE, KEPT, SCHEMES, dequantize
from .base import CPU, GluExpertKernel, LinearKernel, Packed
from .native_glu import NativeGlu
from .native_kept import NativeKept
from .native_linear import NativeLinear
from .torch_floats import OneDnnKernel, RowMajorKernel
from .torch_glu import FloatGlu, LinearsGlu
from .torch_int4 import AtenInt4
from .torch_int8 import SUMMED_QMAX, AtenInt8, FbgemmKernel
from .torch_plain import PlainKernel
from .torch_stored import StoredInt8Glu

# The last of each runs everywhere, but those of `KEPT`: without them they become floats.
KERNELS: dict[str, tuple[Callable[..., LinearKernel], ...]] = {
    "float32": (partial(NativeLinear, "float32"), partial(OneDnnKernel, torch.float32)),
    "bfloat16": (
        partial(NativeLinear, "bfloat16"),
        partial(OneDnnKernel, torch.bfloat16),
        partial(RowMajorKernel, torch.bfloat16),
    ),
    "int8": (partial(NativeLinear, "int8"), FbgemmKernel, partial(FbgemmKernel, SUMMED_QMAX), AtenInt8),
    "int4": (partial(NativeLinear, "int4"), AtenInt4, partial(PlainKernel, "int4")),
    "int3": (partial(NativeLinear, "int3"), partial(PlainKernel, "int3")),
    **{scheme: (partial(NativeKept, scheme),) for scheme in KEPT},
}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}
)
OLDEST = (8, 0)  # of the cards that kernels in Triton were compiled for: its compute capability
TOLERANCE = 0.02  # of the largest output; activations in 8 bits err by 0.5 %


@cache
def choose(name: str, group: int | None = None, device: torch.device = CPU) -> LinearKernel | None:
    """The first kernel of a name that is right on this device; None if there is none. group: of schemes with some."""
    settings = {} if group is None else {"group": group}
    found = KERNELS[name] if device.type == "cpu" else _for_card(name, device)
    return next((kernel for build in found if not fault(kernel := build(**settings))), None)


def has_triton(device: torch.device) -> bool:
    """Whether kernels in Triton can be compiled for a device."""
    there = find_spec("triton") is not None and device.type == "cuda"
    return there and torch.cuda.get_device_capability(device) >= OLDEST


def _for_card(name: str, device: torch.device) -> Iterator[Callable[..., LinearKernel]]:
    if has_triton(device) and (name == "bfloat16" or (name in SCHEMES and SCHEMES[name].on_cards)):
        from .cuda_linear import CudaLinear

        yield partial(CudaLinear, name, device=device)


def experts_of(linear: LinearKernel, activation: str) -> GluExpertKernel:
    """The kernel of whole experts that lie in memory, for one of matrices."""
    if isinstance(linear, NativeLinear | NativeKept):
        return NativeGlu(linear, activation)
    if linear.device.type == "cuda":
        from .cuda_glu import CudaGlu
        from .cuda_linear import CudaLinear

        return CudaGlu(cast(CudaLinear, linear), activation)
    return LinearsGlu(linear, ACTIVATIONS[activation])


def streamed_experts_of(experts: GluExpertKernel | None, activation: str, stored: str) -> GluExpertKernel:
    """The same for experts that are streamed, where `stored` names the form in their files.

    What can compute with the bytes as they were read does: to reorder them would take longer than it saves.
    """
    if experts is not None and experts.reads_stored:
        return experts
    if experts is None or experts.quantization == "none":
        return FloatGlu(ACTIVATIONS[activation])
    return StoredInt8Glu(ACTIVATIONS[activation]) if experts.quantization == stored == "int8" else experts


def kernel_facts(form: str, group: int | None, stored: str) -> KernelFacts | None:
    """What a plan asks of the kernels that this CPU has for a form; see `placement.Machine.kernel`."""
    linear = choose(form, group) if form in KERNELS else None
    dense = choose(DENSE) if form in SCHEMES else linear
    if linear is None or dense is None:
        return None
    experts = experts_of(linear, "silu")
    streamed = streamed_experts_of(experts, "silu", stored)
    name = " + ".join(dict.fromkeys((experts.name, dense.name)))
    dtype = str(dense.dtype).removeprefix("torch.")
    streams: Literal["stored", "cast"] = "cast" if isinstance(streamed, FloatGlu) else "stored"
    return KernelFacts(name, dtype, streams if streamed.reads_stored else "packed")


def card_facts(form: str, group: int | None, device: str) -> KernelFacts | None:
    """The same of a GPU, see `placement.Machine.card`: experts in a form, and the rest in `DENSE` or in floats."""
    place = torch.device(device)
    linear = choose(form, group, place)
    dense = choose(DENSE, None, place) if form in SCHEMES else linear
    if linear is None or dense is None:
        return None
    name = " + ".join(dict.fromkeys((linear.name, dense.name)))
    return KernelFacts(name, str(dense.dtype).removeprefix("torch."), "packed")


def probe() -> dict[str, str]:
    """Which kernel each form of weights has here, in words, for people."""
    chosen = {name: choose(name) for name in KERNELS}
    return {name: kernel.name if kernel else "as stored" for name, kernel in chosen.items()}


def fault(kernel: LinearKernel) -> str | None:
    """Why a kernel cannot be used here, or None: tiny products, with the extremes where sums of bytes overflow."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    weight[0], weight[1] = 1, torch.arange(256) % 2  # all at the upper end: 255 x 127, twice, is more than 16 bits hold
    for n in (1, 5, 40):
        x = torch.randn(n, 256, generator=generator)
        x[0] = 1
        try:
            packed, meant = _both(kernel, weight)
            out = kernel.run(kernel.prepare(x.to(kernel.device, kernel.dtype)), packed).float().cpu()
        except Exception as error:  # of PyTorch, of Triton, or of the C compiler that Triton starts
            return first_line(error)
        exact = x @ meant.cpu().t()
        if not bool(((out - exact).abs() <= TOLERANCE * exact.abs().amax(1, keepdim=True)).all()):
            return "computes wrong numbers here"
    return None


def _both(kernel: LinearKernel, weight: Tensor) -> tuple[Packed, Tensor]:
    """A matrix as the kernel holds it, and as it is meant."""
    if kernel.quantization == "none":
        return kernel.pack(weight), weight
    stored = kernel.quantize(weight)
    return kernel.load(stored), dequantize(kernel.quantization, stored, kernel.group)
