"""From the options of a command line to a plan, and to what would be better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from rich.filesize import decimal

from dbrx_cli.cores import settle_waiting
from dbrx_cli.options import DEMOS, ModelOptions
from model.config import OFFICIAL, DbrxConfig, official
from model.errors import InputError, ModelError
from model.hub import resolve
from model.machine import limited, parse_devices, this_machine
from model.placement import FORMATS, QUANTIZED_ON_GPU, Machine, Placement, Rates, place
from model.quantization import DENSE

if TYPE_CHECKING:
    from model.weights import Extent

CONTEXT = 4096  # tokens that are planned for unless --context says otherwise
WORTH_IT = 1.25  # how much faster a change must be to be advised


@dataclass(frozen=True)
class Question:
    """A model, in a format, on a machine, with a context; `rates` are those of the format on a machine that is here."""

    name: str
    config: DbrxConfig
    dtype: str
    quantize: str
    machine: Machine
    context: int
    stored: str | None = None  # the format in which the files hold the experts, if they can be read straight into it
    offload: str = "auto"
    expert_cache: int | None = None
    rates: Rates | None = None

    @classmethod
    def of(cls, name: str, options: ModelOptions, devices: str | None) -> Question:
        """What a command line asks; nothing larger than a config.json is fetched.

        `ModelError` and `InputError` for what loading would refuse with the same options.
        """
        if not devices:
            settle_waiting()  # torch measures, and must wait as it would when it runs the model
        found = _find(name, options.revision)
        machine = parse_devices(devices) if devices else this_machine(found.experts)
        if options.memory_limits:
            machine = limited(machine, options.memory_limits)
        machine = _computing(machine, options.device_map)
        # What a model's files hold in few bits stays so; --quantize auto leaves floats alone where it does in loading.
        auto = options.quantize == "auto" and found.floats and options.dtype == "auto" and not machine.gpus
        given = "none" if options.quantize == "auto" else options.quantize
        quantize = DENSE if auto else found.quantize if given == "none" else given
        if machine.gpus and quantize != "none":
            raise ModelError(*QUANTIZED_ON_GPU)
        dtype = found.dtype if options.dtype == "auto" else options.dtype
        if options.attn == "flash" and (not machine.gpus or dtype == "float32"):
            raise ModelError("flash attention needs an NVIDIA GPU, and bfloat16 or float16", "leave out --attn")
        question = cls(
            name,
            found.config,
            dtype,
            quantize,
            machine,
            min(options.context or CONTEXT, found.config.max_seq_len),
            stored=found.stored,
            offload=options.offload,
            expert_cache=options.expert_cache_bytes,
        )
        if auto and (plan := question.plan()) and (plan.on_disk or not plan.runs):  # it is streamed as it is stored
            question = replace(question, quantize="none")
        return question if devices else question._measured(options.threads)

    def _measured(self, threads: int | None) -> Question:
        """With the rates of this machine's kernels, if a CPU computes all. What they reach, its memory can do."""
        plan = self.plan()
        if not plan.runs or any(layer.device != "cpu" for layer in plan.layers):
            return self
        import torch

        from model.rates import measure

        if threads:
            torch.set_num_threads(threads)
        rates = measure(self.config, plan.format, streamed=plan.on_disk > 0)
        bandwidth = max(self.machine.cpu.bandwidth, rates.dense, rates.experts)
        machine = replace(self.machine, cpu=replace(self.machine.cpu, bandwidth=bandwidth))
        return replace(self, machine=machine, rates=rates)

    def plan(self) -> Placement:
        """The layout."""
        format = self.dtype if self.quantize == "none" else self.quantize
        if format == "int4" and self.stored == "int4-g128":
            format = "int4-g128"
        return place(
            self.config,
            FORMATS[format],
            self.machine,
            self.context,
            offload=self.offload,
            expert_cache=self.expert_cache,
        )

    def predict(self, plan: Placement) -> float | None:
        """Tokens a second of its own plan; None where nothing was measured, or experts change their form on the way."""
        if self.rates is None or (plan.on_disk and self.stored != plan.format):
            return None
        return plan.predict(self.rates)


def advice(question: Question, plan: Placement) -> Iterator[str]:
    """What a person should know of a plan, and what to change: a sentence each."""
    if not plan.runs:
        needed = plan.sizes.total - plan.sizes.n_layers * plan.sizes.experts
        whole = decimal(plan.sizes.total)
        yield f"it does not run so: the weights take {whole}, {decimal(needed)} beside the experts, and find no room"
    if plan.on_disk:
        read = next((tier for tier in plan.tiers() if tier.what == "disk"), None)
        if read:
            yield f"every token reads {decimal(read.nbytes)} from the disk: about {seconds(read.seconds)} a token"
    if better := _better(question, plan):
        yield better
    longest = plan.largest_context(question.config.max_seq_len)
    if plan.runs and longest < question.config.max_seq_len:
        yield f"there is room for a context of {longest} tokens; the model was made for {question.config.max_seq_len}"


def alternatives(question: Question) -> Iterator[tuple[str, Question]]:
    """Other options that this program can run on the same machine, the nearest to the question first."""
    machine = question.machine
    if machine.gpus:
        for offload in ("cpu", "disk"):
            if question.offload != offload:
                yield f"--offload {offload}", replace(question, offload=offload)
        question = replace(question, machine=replace(machine, gpus=()), offload="auto")
        yield "--device-map cpu", question
    order = ("none", "int8", "int4")
    for name in order[order.index(question.quantize) + 1 :]:
        yield ("--device-map cpu " if machine.gpus else "") + f"--quantize {name}", replace(question, quantize=name)


def _better(question: Question, plan: Placement) -> str | None:
    """The nearest alternative that keeps every weight beside its processor, if it is faster; else the fastest."""
    if plan.resident:
        return None
    others = [(flags, other.plan()) for flags, other in alternatives(question)]
    faster = [(f, other) for f, other in others if other.tokens_per_s() > WORTH_IT * plan.tokens_per_s()]
    for flags, other in faster:
        if other.resident:
            return f"{flags} would fit {_place(other)}: predicted, at most {rate(other.tokens_per_s())} tokens/s"
    if not faster:
        return None
    flags, other = max(faster, key=lambda pair: pair[1].tokens_per_s())
    return f"{flags} would be faster: predicted, at most {rate(other.tokens_per_s())} tokens/s"


def _computing(machine: Machine, device_map: str) -> Machine:
    """The machine without the GPUs that --device-map leaves out."""
    if device_map == "cpu":
        return replace(machine, gpus=())
    if device_map not in ("auto", "balanced", "sequential"):
        raise InputError(
            f"--device-map {device_map} is a map that is given, and `plan` finds one",
            "leave it out, or give auto, balanced, sequential or cpu",
        )
    return machine


def _place(plan: Placement) -> str:
    used = {layer.device for layer in plan.layers}
    if used == {"cpu"}:
        return "the CPU's memory"
    return "on one GPU" if len(used) == 1 else f"on {len(used)} GPUs"


def seconds(value: float) -> str:
    """A time with two digits that count."""
    return f"{value:.2g} s" if value < 100 else f"{value / 60:.0f} min"


def rate(value: float) -> str:
    """Tokens a second with the digits that count."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


@dataclass(frozen=True)
class Found:
    """What is known of a model before it is loaded; `experts` as they lie in its files, if these are here."""

    config: DbrxConfig
    dtype: str = "bfloat16"
    quantize: str = "none"
    stored: str | None = "bfloat16"
    floats: bool = True  # whether the files hold floats
    experts: Sequence[Sequence[Extent]] = ()


def _find(name: str, revision: str | None) -> Found:
    """Look for a model here, among the official ones, and for its config.json on the Hub."""
    if name in DEMOS:
        from dbrx_cli.demo import demo_folder, is_complete

        if not is_complete(name):
            raise ModelError("the demo model is not here yet", f"fetch it once: dbrx generate -m {name} hello")
        name = str(demo_folder(name))
    try:
        path = resolve(name, revision=revision, download=False)
    except ModelError:
        if name in OFFICIAL:
            return Found(official())
        path = resolve(name, revision=revision, patterns=["config.json"])
        return Found(DbrxConfig.from_json(path / "config.json"))
    from model.checkpoint import FLOATS
    from model.formats import open_weights
    from model.formats.quantized import QuantizedWeights

    with open_weights(path) as weights:
        config = weights.config
        places = product(range(config.n_layers), range(config.ffn_config.moe_num_experts))
        experts = [weights.expert_extents(layer, expert) for layer, expert in places]
        if isinstance(weights, QuantizedWeights):
            kind = weights.quantization
            return Found(config, "bfloat16", kind, "int4-g128" if weights.group == 128 else kind, False, experts)
        mostly = weights.dtypes().most_common(1)[0][0]
        dtype = {"F32": "float32", "F16": "float16"}.get(mostly, "bfloat16")
        plain = dtype if weights.plain_experts else None
        return Found(config, dtype, stored=plain, floats=mostly in FLOATS, experts=experts)
