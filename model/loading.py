"""The composer: from a checkpoint's name to a network that is ready to run.

Build on the meta device, choose a dtype and devices, read each tensor straight to its place, attach the hooks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from .adapters import AdaptedWeights, attach, digest, read_adapter
from .checkpoint import expected_tensors
from .devices import AUTOMATIC, CONTEXT, DeviceMap, dispatch, plan_devices
from .errors import ModelError
from .formats import open_weights
from .generation_config import GenerationConfig
from .hub import resolve
from .kernels.native_block import decode_natively
from .kernels.native_call import set_threads
from .offload import decide, one_device, stream_experts, take_out_experts
from .packing import Packing, choose_packing, pack_into, take_out_dense
from .parallel import Ranks, ShardedWeights, localize
from .placement import QUANTIZED_ON_GPU
from .quantization import DENSE, SCHEMES
from .weights import Weights

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

Network = TypeVar("Network", bound="DbrxForCausalLM")
EMBEDDING = "transformer.wte.weight"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def from_pretrained(
    cls: type[Network],
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device_map: str | int | torch.device | DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    offload: str = "none",
    expert_cache: int | None = None,
    context: int | None = None,
    ranks: Ranks | None = None,
    adapter: str | Path | None = None,
    quantize: str = "none",
    pack: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Network:
    """Load a checkpoint from a folder or a Hub id, ready for inference.

    dtype (or torch_dtype): "auto" keeps the checkpoint's. device_map: a device, "auto", "balanced" or "sequential"
    through accelerate within `max_memory`, or a dict of module names to devices; None is the CPU.
    attn_implementation: auto, eager, sdpa, flash (or flash_attention_2). `trust_remote_code` is accepted and has no
    effect: code that a checkpoint ships is never run. offload: "disk" reads experts as they are needed, from the
    checkpoint's own files, "cpu" keeps them in the CPU's memory beside a GPU, "auto" streams what would not fit;
    expert_cache: bytes of memory for streamed experts (default: most of what is free). context: tokens that room is
    left for. adapter: the folder of a LoRA adapter (`adapters`). `ranks` loads one rank's slices of every layer
    (`parallel`). quantize: "int8" or "int4", on the CPU; "none" keeps what is stored; "auto" makes int8 of floats that
    stay in the CPU's memory, where no dtype is asked for, and keeps all else. `pack` has weights held by the CPU's
    kernels: faster, but they are no parameters any more. `progress` hears bytes read and bytes in all.

    `ModelError` if the checkpoint is missing, damaged or of another kind, `ResourceError` if it does not fit.
    """
    set_threads()
    folder = resolve(name_or_path, revision=revision, token=token)
    with open_weights(folder) as opened:
        changes = read_adapter(adapter, opened.config) if adapter is not None else {}
        beside = opened.quantization != "none"  # a change that is merged into a coarse grid would be lost
        if changes and beside and ranks is not None:
            raise ModelError("an adapter over quantized weights runs on one device only", "leave out --adapter")
        adapted: Weights = AdaptedWeights(opened, changes) if changes and not beside else opened
        weights: Weights = adapted if ranks is None else ShardedWeights(adapted, ranks)
        wanted = dtype if dtype is not None else torch_dtype
        for scheme in _schemes(quantize, wanted, weights, device_map) if ranks is None else ("none",):
            chosen = choose_dtype(wanted, weights)
            packing = _packing(scheme, pack, weights, chosen, device_map) if ranks is None else None
            kept = chosen if packing is None else packing.kv_dtype or packing.dtype  # type of what is not quantized
            chosen = chosen if packing is None else packing.dtype
            with torch.device("meta"):
                network = cls(weights.config, attn_implementation="eager").to(chosen).eval()
            if packing is not None:
                device_map = "cpu"
            if ranks is not None:
                localize(network, ranks)
                device_map = f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else "cpu"
            on_gpu = torch.cuda.is_available() and device_map is not None and str(device_map) != "cpu"
            streamed = decide(offload, network, kept, packing, max_memory, on_gpu=on_gpu) if ranks is None else "none"
            if streamed == "none":
                break
        if streamed != "none":
            take_out_experts(network)
            device_map = one_device(device_map)
        if packing is not None:
            take_out_dense(network)
            take_out_experts(network)
        places = plan_devices(network, device_map, max_memory, chosen, context or CONTEXT)
        reading = Reading(weights, progress, experts=streamed == "none")
        _read_weights(network, reading, places, chosen, owned=streamed != "none", packed=packing is not None)
        if packing is not None:
            pack_into(network, weights, packing, reading.advance, experts=streamed == "none")
            network.packing = packing
            network.transformer.set_kv_dtype(packing.kv_dtype)
        if streamed != "none":
            stream_experts(network, weights, kept, packing, host=streamed == "cpu", budget=expert_cache)
        if not (changes and beside):  # what lies beside a layer, a native step would not see
            decode_natively(network)
    if beside:
        attach(network, changes)
    network.adapter = digest(changes)
    network.generation_config = GenerationConfig.from_source(folder)
    network.device_map = dict(places)
    if len(set(places.values())) > 1:
        dispatch(network, places)
    network.transformer.set_attention(attn_implementation)
    return network


def save_pretrained(network: DbrxForCausalLM, folder: Path, max_shard_size: int | str) -> None:
    """Write the network as a checkpoint folder that `from_pretrained` reads."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    if network.expert_store is not None:
        raise ValueError("the experts are streamed, and not here to be saved: load the network without offload")
    if network.packing is not None:
        raise ValueError("the weights were packed for a kernel, and cannot be saved: load the network without")
    network.config.save_pretrained(folder)
    (network.generation_config or GenerationConfig()).save(folder)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def choose_dtype(wanted: str | torch.dtype | None, weights: Weights) -> torch.dtype:
    """The type to load weights in; None and "auto" keep the stored one, and turn quantized weights into bfloat16."""
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted in (None, "auto"):
        (stored, _), *_ = weights.dtypes().most_common(1)
        return STORED.get(stored, torch.bfloat16)
    if wanted not in DTYPES:
        raise ValueError(f"dtype {wanted!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[wanted]


def _schemes(
    quantize: str,
    dtype: str | torch.dtype | None,
    weights: Weights,
    device_map: str | int | torch.device | DeviceMap | None,
) -> Sequence[str]:
    """What to make of the weights: the first with which they stay in memory, else the last."""
    if quantize != "auto":
        return (quantize,)
    (stored, _), *_ = weights.dtypes().most_common(1)
    floats = weights.quantization == "none" and stored in STORED and dtype in (None, "auto")
    return (DENSE, "none") if floats and _on_cpu(device_map) else ("none",)


def _on_cpu(device_map: str | int | torch.device | DeviceMap | None) -> bool:
    return device_map is None or str(device_map) == "cpu" or (device_map in AUTOMATIC and not torch.cuda.is_available())


def _packing(
    quantize: str,
    pack: bool,
    weights: Weights,
    dtype: torch.dtype,
    device_map: str | int | torch.device | DeviceMap | None,
) -> Packing | None:
    """The kernels that the weights are to be packed for; None leaves them as they are."""
    wanted = quantize if quantize != "none" else weights.quantization
    on_cpu = _on_cpu(device_map)
    if wanted in SCHEMES and not on_cpu:
        raise ModelError(*QUANTIZED_ON_GPU)
    if wanted not in SCHEMES and not (on_cpu and pack):
        return None
    return choose_packing(quantize, weights, dtype)


class Reading:
    """Weights, and how many of their bytes were read, for a progress bar."""

    def __init__(self, weights: Weights, progress: Callable[[int, int], None] | None, experts: bool) -> None:
        self.weights = weights
        self._progress = progress
        names = expected_tensors(weights.config)
        self._total = sum(weights.nbytes_of(name) for name in names if experts or ".experts." not in name)
        self._done = 0

    def advance(self, nbytes: int) -> None:
        """So many more bytes were read."""
        self._done += nbytes
        if self._progress:
            self._progress(self._done, self._total)


def _read_weights(
    network: DbrxForCausalLM,
    reading: Reading,
    places: Mapping[str, torch.device],
    dtype: torch.dtype,
    owned: bool,
    packed: bool,
) -> None:
    """Each tensor once, to its device; on the CPU in its stored dtype it stays a map of the file, uncopied.

    With `owned` nothing does: memory is short, and a file may go away while it is streamed from. With `packed` only
    the embedding does, of which rows are read. In both cases it keeps its stored type.
    """
    weights, state = reading.weights, {}
    for name, parameter in network.state_dict().items():
        prefix = max((p for p in places if not p or name == p or name.startswith(p + ".")), key=len)
        floats = weights.nbytes_of(name) >= 2 * parameter.numel()  # no fewer bits than any float has
        as_stored = (owned or packed) and floats and name == EMBEDDING and places[prefix].type == "cpu"
        own = owned or (packed and not as_stored)
        state[name] = weights.read(name, dtype=None if as_stored else dtype, device=places[prefix], owned=own)
        reading.advance(weights.nbytes_of(name))
        if own:
            weights.give_back()
    network.load_state_dict(state, assign=True)
