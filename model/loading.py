"""From a checkpoint's name to a network that is ready to run.

Decide everything (`load_planner`), build on the meta device, read each tensor straight to its place, attach the hooks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from .adapters import AdaptedWeights, attach, digest, read_adapter
from .checkpoint import EMBEDDING, expected_tensors
from .config import DbrxConfig
from .devices import DeviceMap, dispatch, find_device, read_device_map, require_all
from .errors import ModelError
from .expert_use import Counts
from .formats import open_weights
from .formats.ollama import manifest_of
from .generation_config import GenerationConfig
from .hub import resolve
from .kernels.native_block import decode_natively
from .kernels.native_call import set_threads
from .kernels.native_kept import KeptEmbedding
from .load_plan import AUTOMATIC, LoadOptions, LoadPlan, Stored
from .load_planner import plan_load
from .machine import free_memory
from .model_files import ModelFiles
from .offload import stream_experts, strip_experts
from .packing import kernels_of, pack_into, strip_dense
from .parallel import Ranks, ShardedWeights, localize
from .placement import place_of
from .quantization import KEPT
from .weights import CanBeKept, KeptWeights, Weights

if TYPE_CHECKING:
    from .causal_lm import DbrxForCausalLM

Network = TypeVar("Network", bound="DbrxForCausalLM")


def from_pretrained(
    cls: type[Network],
    name_or_path: str | Path | ModelFiles,
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
    graph: bool = True,
    use: Counts = (),
    progress: Callable[[int, int], None] | None = None,
) -> Network:
    """Load a checkpoint from a folder (or its `ModelFiles`) or a Hub id, ready for inference.

    dtype (or torch_dtype): "auto" keeps the checkpoint's. device_map: a device, "auto", "balanced" or "sequential"
    through accelerate within `max_memory`, or a dict of module names to devices; None is the CPU.
    attn_implementation: auto, eager, sdpa, flash (or flash_attention_2). `trust_remote_code` is accepted and has no
    effect: code that a checkpoint ships is never run. offload: "disk" reads experts as they are needed, from the
    checkpoint's own files, "cpu" keeps them in the CPU's memory beside a GPU, "auto" streams what would not fit; in
    few bits, both have the CPU compute the experts that find no room on the GPU; expert_cache: bytes of memory for
    streamed experts (default: most of what is free). context: tokens that room is left for. adapter: the folder of a
    LoRA adapter (`adapters`). `ranks` loads one rank's slices of every layer (`parallel`). quantize: a key of
    `SCHEMES`; "none" keeps what is stored; "auto" makes int8 of floats that stay in the CPU's memory, where no dtype
    is asked for, and keeps all else. `pack` has floats held by the kernels of the CPU, or of GPUs that
    hold all in bfloat16: faster, but they are no parameters any more. graph: decode steps on a card are replayed as
    CUDA graphs. use: how many tokens chose each expert so far (`Bus.used`): a card that does not hold all experts gets
    those of most use. `progress` hears bytes read and bytes in all.

    What was decided stands in `load_plan` of the network. `ModelError` if the checkpoint is missing, damaged or of
    another kind, `ResourceError` if it does not fit.
    """
    set_threads()
    files = name_or_path
    if not isinstance(files, ModelFiles):
        files = ModelFiles(resolve(files, revision=revision, token=token), manifest_of(files))
    with open_weights(files) as opened:
        changes = read_adapter(adapter, opened.config) if adapter is not None else {}
        if changes and opened.quantization != "none" and ranks is not None:
            raise ModelError("an adapter over quantized weights runs on one device only", "leave out --adapter")
        plan = plan_here(
            opened,
            LoadOptions(
                dtype=_dtype_name(dtype if dtype is not None else torch_dtype),
                quantize=quantize if ranks is None else "none",
                pack=pack,
                device_map=_device_map(device_map, ranks),
                max_memory=max_memory,
                offload=offload if ranks is None else "none",
                expert_cache=expert_cache,
                context=context,
                ranks=ranks.size if ranks is not None else 1,
                use=use,
            ),
        )
        weights = KeptWeights(cast("CanBeKept", opened), plan.scheme) if plan.scheme in KEPT else opened
        beside = weights.quantization != "none"  # a change that is merged into a coarse grid would be lost
        if changes and not beside:
            weights = AdaptedWeights(weights, changes)
        network = _build(cls, plan, weights.config, ranks)
        _read(network, plan, weights if ranks is None else ShardedWeights(weights, ranks), progress)
        if not (changes and beside) and ranks is None:  # what lies beside a layer, a step at once would not see
            decode_natively(network)
            (first, *others) = {layer.device for layer in plan.layers}
            if network.kernels is not None and first.startswith("cuda") and not others:
                from .kernels.cuda_block import decode_on_card

                decode_on_card(network, graph)
    if beside:
        attach(network, changes)
    network.adapter = digest(changes)
    network.generation_config = GenerationConfig.from_source(files)
    if len(set(network.device_map.values())) > 1:
        dispatch(network, network.device_map)
    network.transformer.set_attention(attn_implementation)
    return network


def plan_here(weights: Weights, options: LoadOptions) -> LoadPlan:
    """The plan for this machine as it is now; what finds no room is raised."""
    if not isinstance(options.device_map, str):
        require_all(weights.config, options.device_map)
    machine = free_memory(gpus=options.device_map != "cpu" and torch.cuda.is_available())
    plan = plan_load(weights.config, Stored.of(weights), machine, options)
    if plan.fault is not None:
        raise plan.fault
    return plan


def _dtype_name(dtype: str | torch.dtype | None) -> str:
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def _device_map(device_map: str | int | torch.device | DeviceMap | None, ranks: Ranks | None) -> str | dict[str, str]:
    """A device map in a plan's words; `ModelError` if a device that it names is not there."""
    if ranks is not None:
        return f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, str) and device_map.endswith(".json"):
        device_map = read_device_map(Path(device_map))
    if isinstance(device_map, Mapping):
        return {name: str(find_device(place)) for name, place in device_map.items()}
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        return device_map
    return "cpu" if device_map is None else str(find_device(device_map))


def _build(cls: type[Network], plan: LoadPlan, config: DbrxConfig, ranks: Ranks | None) -> Network:
    """The network of a plan on the meta device, without what will not be a tensor of it."""
    with torch.device("meta"):
        network = cls(config, attn_implementation="eager").to(getattr(torch, plan.dtype)).eval()
    if ranks is not None:
        localize(network, ranks)
    if plan.kernel is not None:
        strip_dense(network)
    if plan.kernel is not None or plan.streamed:
        strip_experts(network)
    network.load_plan = plan
    network.device_map = {name: find_device(place) for name, place in plan.device_map.items()}
    network.prefill_chunk = plan.chunk
    return network


def _read(
    network: DbrxForCausalLM, plan: LoadPlan, weights: Weights, progress: Callable[[int, int], None] | None
) -> None:
    """Every weight to the place that the plan gives it."""
    kernels = kernels_of(plan, weights)
    resident = not plan.streamed
    reading = Reading(weights, progress, experts=resident)
    if isinstance(weights, KeptWeights) and (embedding := weights.kept_matrix(EMBEDDING)):
        network.transformer.wte = KeptEmbedding(embedding)
        reading.advance(weights.nbytes_of(EMBEDDING))
    _read_tensors(network, plan, reading)
    if kernels:
        pack_into(network, weights, kernels, reading.advance, plan)
        network.kernels = next(iter(kernels.values()))  # their names and types are the same on every device
        network.transformer.set_kv_dtype(network.kernels.kv_dtype)
    if not resident:
        stream_experts(network, weights, plan, network.kernels)


def save_pretrained(network: DbrxForCausalLM, folder: Path, max_shard_size: int | str) -> None:
    """Write the network as a checkpoint folder that `from_pretrained` reads."""
    from huggingface_hub import constants, split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    if network.expert_store is not None:
        raise ValueError("the experts are streamed, and not here to be saved: load the network without offload")
    if network.kernels is not None:
        raise ValueError("the weights were packed for a kernel, and cannot be saved: load the network without")
    network.config.save_pretrained(folder)
    (network.generation_config or GenerationConfig()).save(folder)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    split = split_state_dict_into_shards_factory(  # the one for tensors imports PyTorch's distributed ones: a second
        state,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=constants.SAFETENSORS_WEIGHTS_FILE_PATTERN,
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


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


def _read_tensors(network: DbrxForCausalLM, plan: LoadPlan, reading: Reading) -> None:
    """Each tensor once, to its device; on the CPU in its stored dtype it stays a map of the file, uncopied.

    Where experts are streamed nothing does: memory is short, and a file may go away while it is streamed from. Where
    weights are packed only the embedding does, of which rows are read. In both cases it keeps its stored type.
    """
    weights, places, state = reading.weights, network.device_map, {}
    dtype, owned, packed = getattr(torch, plan.dtype), plan.streamed > 0, plan.kernel is not None
    for name, parameter in network.state_dict().items():
        place = place_of(name, places)
        assert place is not None  # a map has all modules: see `require_all`
        floats = weights.nbytes_of(name) >= 2 * parameter.numel()  # no fewer bits than any float has
        as_stored = (owned or packed) and floats and name == EMBEDDING and place.type == "cpu"
        own = owned or (packed and not as_stored)
        state[name] = weights.read(name, dtype=None if as_stored else dtype, device=place, owned=own)
        reading.advance(weights.nbytes_of(name))
        if own:
            weights.give_back()
    network.load_state_dict(state, assign=True)
