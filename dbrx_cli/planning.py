"""From the options of a command line to a plan, and to what would be better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from dbrx_cli.options import ModelOptions
from model.config import OFFICIAL, DbrxConfig, official
from model.errors import ModelError
from model.hub import resolve
from model.machine import limited, parse_devices, this_machine
from model.placement import FORMATS, Machine, Placement, place

CONTEXT = 4096  # tokens that are planned for unless --context says otherwise
WORTH_IT = 1.25  # how much faster a change must be to be advised


@dataclass(frozen=True)
class Question:
    """A model, in a format, on a machine, with a context."""

    name: str
    config: DbrxConfig
    dtype: str
    quantize: str
    machine: Machine
    context: int

    @classmethod
    def of(cls, name: str, options: ModelOptions, devices: str | None) -> Question:
        """What a command line asks; nothing larger than a config.json is fetched."""
        config, stored, files = _find(name, options.revision)
        machine = parse_devices(devices) if devices else this_machine(files)
        if options.memory_limits:
            machine = limited(machine, options.memory_limits)
        dtype = stored if options.dtype == "auto" else options.dtype
        context = min(options.context or CONTEXT, config.max_seq_len)
        return cls(name, config, dtype, options.quantize, machine, context)

    def plan(self, quantize: str | None = None) -> Placement:
        """The layout, perhaps with another quantization."""
        quantize = quantize or self.quantize
        format = self.dtype if quantize == "none" else quantize
        if format == "int4" and self.machine.gpus:
            format = "int4-g128"  # smaller, and what fits one card of 80 GB
        return place(self.config, FORMATS[format], self.machine, self.context)


def advice(question: Question, plan: Placement) -> Iterator[str]:
    """What a person should know of a plan, and what to change: a sentence each."""
    if not plan.runs:
        needed = plan.sizes.total - plan.sizes.n_layers * plan.sizes.experts
        yield f"it does not run: what every token needs, {decimal(needed)} beside the experts, finds no room"
    if plan.on_disk:
        read = next((tier for tier in plan.tiers() if tier.what == "disk"), None)
        if read:
            yield f"every token reads {decimal(read.nbytes)} from the disk: about {seconds(read.seconds)} a token"
    if better := _better(question, plan):
        yield better
    longest = plan.largest_context(question.config.max_seq_len)
    if plan.runs and longest < question.config.max_seq_len:
        yield f"there is room for a context of {longest} tokens; the model was made for {question.config.max_seq_len}"


def _better(question: Question, plan: Placement) -> str | None:
    """The least quantization that keeps every weight beside its processor; else the one that is fastest."""
    if plan.resident:
        return None
    order = ("none", "int8", "int4")
    smaller = {name: question.plan(name) for name in order[order.index(question.quantize) + 1 :]}
    for name, other in smaller.items():
        if other.resident:
            return f"--quantize {name} would fit {_place(other)}: at most {rate(other.tokens_per_s())} tokens/s"
    name, other = max(smaller.items(), key=lambda pair: pair[1].tokens_per_s(), default=("", plan))
    if other.tokens_per_s() > WORTH_IT * plan.tokens_per_s():
        return f"--quantize {name} would be faster: at most {rate(other.tokens_per_s())} tokens/s"
    return None


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


def _find(name: str, revision: str | None) -> tuple[DbrxConfig, str, Path | None]:
    """Configuration, dtype of the weights, and where they lie if they are here."""
    if name == "demo":
        from dbrx_cli.demo import demo_folder, is_complete

        name = str(demo_folder())
        if not is_complete(Path(name)):
            raise ModelError("the demo model is not here yet", "fetch it once: dbrx generate -m demo hello")
    try:
        path = resolve(name, revision=revision, download=False)
    except ModelError:
        if name in OFFICIAL:
            return official(), "bfloat16", None
        path = resolve(name, revision=revision, patterns=["config.json"])
        return DbrxConfig.from_json(path / "config.json"), "bfloat16", None
    from model.formats import open_weights

    with open_weights(path) as weights:
        stored = weights.dtypes().most_common(1)[0][0]
        return weights.config, {"F32": "float32", "F16": "float16"}.get(stored, "bfloat16"), path
