"""The plan of a load: in which form the weights are computed with, then where everything lies (`load_layout`).

Arithmetic alone: what is stored, a machine and options in; a `LoadPlan` out. Imports without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any

from .config import DbrxConfig
from .errors import ModelError
from .load_layout import ON_THE_CPU, device_name, lay_out
from .load_plan import AUTOMATIC, CONTEXT, LoadOptions, LoadPlan, Stored
from .machine import limited
from .placement import FLOAT_BYTES, Device, Format, KernelFacts, Machine, format_of, sizes
from .quantization import DENSE, SCHEMES


def plan_load(config: DbrxConfig, stored: Stored, machine: Machine, options: LoadOptions) -> LoadPlan:
    """Decide all that loading does. `ModelError` for what cannot be combined; what finds no room has a `fault`.

    Beside GPUs, `offload` "auto" and "none" spread whole layers over them, and leave the rest in the CPU's memory.
    Else one device computes, the first GPU or the CPU: "disk" leaves the experts on the disk, "cpu" in the CPU's
    memory beside a GPU, and "auto" on the disk if they do not fit. Weights in few bits lie on as few GPUs as hold them;
    with "auto" and "cpu" the CPU holds the experts that find no room there, and computes them.
    quantize "auto" makes int8 of floats that then stay in the CPU's memory, where no dtype is asked for, and keeps all
    else.
    """
    options = _on_one_device(options)
    stored = replace(stored, slot=stored.slot or _stored_bytes(config, stored))
    machine = _computing(limited(machine, options.max_memory or {}), options.device_map)
    quantize = options.quantize
    if stored.kept is not None and _keeps_form(stored.kept, machine, options):
        stored = replace(stored, scheme=stored.kept.kept_as)
        quantize = "none"
    if quantize == "auto":
        quantize = "none"
        floats = stored.float_type is not None and options.dtype == "auto" and _packs(machine, options)
        if floats and options.ranks == 1 and (plan := _plan(config, stored, machine, options, DENSE)).resident:
            form = f"the weights become {DENSE} as they are read; --quantize none computes with them as stored"
            return replace(plan, notices=(form, *plan.notices))
    return _plan(config, stored, machine, options, quantize)


def _on_one_device(options: LoadOptions) -> LoadOptions:
    """For experts that are streamed, a map of modules is that of the one device that it names."""
    if isinstance(options.device_map, str) or options.offload not in ("cpu", "disk"):
        return options
    devices = sorted({device_name(place) for place in options.device_map.values()})
    if len(devices) > 1:
        fault = f"streamed experts compute on one device, not on {', '.join(devices)}"
        raise ModelError(fault, "give --device-map one device")
    return replace(options, device_map=devices[0])


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


def _plan(config: DbrxConfig, stored: Stored, machine: Machine, options: LoadOptions, quantize: str) -> LoadPlan:
    """The plan for one form of the weights, with what the user should know."""
    plan = lay_out(_in_form(config, stored, machine, options, quantize), stored, options)
    if plan.machine.gpus and plan.kernel and plan.scheme == "none" and (plan.on_cpu or not plan.runs):
        options = replace(options, pack=False)  # floats of which some lie elsewhere are PyTorch's
        plan = lay_out(_in_form(config, stored, machine, options, quantize), stored, options)
    told = list(plan.notices)
    if stored.scheme == plan.scheme == "none" and stored.float_type is None and options.dtype == "auto":
        told.append(f"the files hold {stored.dtype} weights, which become {plan.format}; --dtype chooses another")
    if plan.streamed and options.offload == "auto":
        told.append(f"the experts do not fit into memory and are read when they are needed; {_kept(plan)}")
    return replace(plan, notices=tuple(told))


def _in_form(config: DbrxConfig, stored: Stored, machine: Machine, options: LoadOptions, quantize: str) -> LoadPlan:
    """A plan in which nothing has its place yet: dtypes, scheme, kernel, and the sizes that follow from them."""
    scheme = quantize if quantize != "none" else stored.scheme
    packs, may_pack = _packs(machine, options), options.pack and options.ranks == 1
    if scheme in SCHEMES:
        for inputs in (config.d_model, config.ffn_config.ffn_hidden_size):
            SCHEMES[scheme].check(inputs)
    has_groups = scheme in SCHEMES and SCHEMES[scheme].groups
    group = stored.group if scheme == stored.scheme and has_groups else None
    dtype = (stored.float_type or "bfloat16") if options.dtype == "auto" else options.dtype
    form = dtype if scheme == "none" else scheme
    wanted = packs and (scheme != "none" or may_pack)
    kernel = machine.kernel(form, group, stored.scheme) if wanted else None
    if scheme != "none" and not packs:
        machine, kernel = _on_cards(machine, options, scheme, group)
    elif may_pack and machine.gpus and isinstance(options.device_map, str) and options.offload in ("auto", "none"):
        kernels = [machine.card(form, None, gpu.name) for gpu in machine.gpus]
        kernel = kernels[0] if all(kernels) else None  # else PyTorch multiplies
    activations = kernel.dtype if kernel else dtype
    kv_dtype = dtype if scheme == "none" else activations
    kept_dtype = stored.float_type if kernel and packs else None  # the embedding's, of which rows are read
    embedding: float = FLOAT_BYTES[kept_dtype or dtype]
    if stored.kept is not None and scheme == stored.kept.kept_as:
        layout, embedding = stored.kept, stored.kept.rest
    else:
        layout = format_of(scheme, group) if scheme != "none" else Format.floats(dtype)
    parts = sizes(config, layout, FLOAT_BYTES[activations], FLOAT_BYTES[kv_dtype], embedding)
    ranks = options.ranks
    as_stored = stored.holds(scheme) and stored.keeps(dtype)
    return LoadPlan(
        machine,
        replace(parts, dense=parts.dense // ranks, expert=parts.expert // ranks, kv=parts.kv // ranks),
        layout.name,
        activations,
        kv_dtype,
        scheme,
        kernel,
        converts=scheme not in ("none", stored.scheme),
        as_stored=as_stored,
        mapped=as_stored and not machine.gpus and (not kernel or kernel.streams == "stored"),
        context=min(options.context or CONTEXT, config.max_seq_len),
    )


def _on_cards(machine: Machine, options: LoadOptions, scheme: str, group: int | None) -> tuple[Machine, KernelFacts]:
    """The machine with the GPUs that can compute weights in few bits, and their kernels."""
    hint = ON_THE_CPU if options.ranks == 1 else f"run it without torchrun, and {ON_THE_CPU}"
    apart = not isinstance(options.device_map, str) or options.offload == "disk"
    if scheme in SCHEMES and not SCHEMES[scheme].on_cards:
        raise ModelError(f"{scheme} weights compute on the CPU", hint)
    if apart or scheme not in SCHEMES:
        raise ModelError(f"{scheme} weights compute on GPUs and on the CPU, from their memory", hint)
    kernels = {gpu.name: machine.card(scheme, group, gpu.name) for gpu in machine.gpus}
    able = tuple(gpu for gpu in machine.gpus if kernels[gpu.name])
    kernel = next(filter(None, kernels.values()), None)
    if kernel is None:
        wanted = "Triton, a C compiler for it, and a GPU of compute capability 8.0 (Ampere) or newer (`dbrx doctor`)"
        raise ModelError(f"{machine.gpus[0].name} has no kernels for {scheme} weights: they need {wanted}", hint)
    return replace(machine, gpus=able), kernel


def _keeps_form(kept: Format, machine: Machine, options: LoadOptions) -> bool:
    """Whether another program's form is computed with: who names a type, or another form, asks for its numbers."""
    free = options.quantize in ("auto", "none") and options.dtype == "auto" and options.pack and options.ranks == 1
    return free and _packs(machine, options) and machine.kernel(kept.kept_as, None, kept.kept_as) is not None


def _stored_bytes(config: DbrxConfig, stored: Stored) -> int:
    """Bytes of an expert in its files, where they are not here to be asked."""
    form = format_of(stored.scheme, stored.group) if stored.scheme != "none" else Format.floats("bfloat16")
    return sizes(config, form).expert


def _kept(plan: LoadPlan) -> str:
    """How many of the streamed experts are held, in words."""
    n, experts = plan.sizes.n_layers, plan.sizes.n_experts
    return f"{plan.kept} of {n * experts} are kept at a time, {plan.kept / n:.3g} of {experts} a layer"
