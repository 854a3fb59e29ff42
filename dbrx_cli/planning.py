"""From the options of a command line to a plan and its speed, and to what would be better."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

from rich.filesize import decimal

from dbrx_cli.cores import configure_openmp
from dbrx_cli.engine.use import use_of
from dbrx_cli.options import DEMOS, ModelOptions, require_context
from model.config import OFFICIAL, DbrxConfig, official
from model.errors import InputError, ModelError
from model.expert_use import Counts
from model.hub import resolve
from model.load_plan import AUTOMATIC, LoadOptions, LoadPlan, Stored
from model.load_planner import plan_load
from model.machine import parse_devices, this_machine
from model.placement import KV_BLOCK, Machine
from model.quantization import SCHEMES
from model.speed import Rates, predict, tiers, tokens_per_s

if TYPE_CHECKING:
    from model.weights import Extent

WORTH_IT = 1.25  # how much faster a change must be to be advised


@dataclass(frozen=True)
class Question:
    """A model, on a machine, with options; `rates` are those of its kernels on a machine that is here."""

    name: str
    config: DbrxConfig
    stored: Stored
    machine: Machine
    options: LoadOptions
    rates: Rates | None = None

    @classmethod
    def of(cls, name: str, options: ModelOptions, devices: str | None) -> Question:
        """What a command line asks; nothing larger than a config.json is fetched.

        `ModelError` and `InputError` for what loading would refuse with the same options.
        """
        if not devices:
            configure_openmp()  # torch measures, and must wait as it would when it runs the model
        if options.device_map not in (*AUTOMATIC, "cpu"):
            raise InputError(
                f"--device-map {options.device_map} is a map that is given, and `plan` finds one",
                "leave it out, or give auto, balanced, sequential or cpu",
            )
        found = _find(name, options.revision)
        require_context(options.context, found.config.max_seq_len)
        machine = parse_devices(devices) if devices else this_machine(found.experts)
        question = cls(name, found.config, found.stored, machine, LoadOptions(use=found.use, **options.loading))
        plan = question.plan
        if options.attn == "flash" and (not plan.machine.gpus or plan.dtype == "float32"):
            raise ModelError("flash attention needs an NVIDIA GPU, and bfloat16 or float16", "leave out --attn")
        return question if devices else question._measured(options.threads)

    def _measured(self, threads: int | None) -> Question:
        """With the rates of this machine's kernels, if a CPU computes all. What they reach, its memory can do."""
        plan = self.plan
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

    @cached_property
    def plan(self) -> LoadPlan:
        """What loading would do."""
        return plan_load(self.config, self.stored, self.machine, self.options)

    @cached_property
    def largest_context(self) -> int:
        """The largest context that there is room for; beside a GPU, more experts go to the CPU for a longer one."""
        limit = self.config.max_seq_len
        if not self.plan.on_cpu:
            return self.plan.largest_context(limit)

        def context(blocks: int) -> int:
            return min(limit, blocks * KV_BLOCK)

        def is_too_long(blocks: int) -> bool:
            options = replace(self.options, context=context(blocks))
            return not plan_load(self.config, self.stored, self.machine, options).runs

        return context(bisect_left(range(1, -(-limit // KV_BLOCK) + 1), True, key=is_too_long))

    @property
    def predicted(self) -> float | None:
        """Tokens a second; None where nothing was measured, or experts change their form on the way."""
        if self.rates is None or (self.plan.on_disk and not self.plan.as_stored):
            return None
        return predict(self.plan, self.rates)


def advice(question: Question) -> Iterator[str]:
    """What a person should know of a plan, and what to change: a sentence each."""
    plan = question.plan
    if plan.fault:
        needed = plan.sizes.total - plan.sizes.n_layers * plan.sizes.experts
        yield f"it does not run so: {plan.fault.message}; {decimal(needed)} of them lie beside the experts"
    yield from plan.notices
    if plan.on_cpu:
        yield _by_use(plan)
    if plan.on_disk:
        read = next((tier for tier in tiers(plan) if tier.what == "disk"), None)
        if read:
            yield f"every token reads {decimal(read.nbytes)} from the disk: about {seconds(read.seconds)} a token"
    if better := _better(question):
        yield better
    longest = question.largest_context
    if plan.runs and longest < question.config.max_seq_len:
        yield f"--context has room for {longest} at most; the model was made for {question.config.max_seq_len}"


def alternatives(question: Question) -> Iterator[tuple[str, Question]]:
    """Other options that this program can run on the same machine, the nearest to the question first."""
    plan, options, prefix, schemes = question.plan, question.options, "", list(SCHEMES)
    finer = schemes[schemes.index(plan.scheme) + 1 if plan.scheme in schemes else 0 :]
    if plan.machine.gpus:
        for offload in ("cpu", "disk"):
            if options.offload != offload and plan.scheme == "none":
                yield f"--offload {offload}", replace(question, options=replace(options, offload=offload))
        for scheme in (each for each in finer if SCHEMES[each].on_cards and options.offload != "disk"):
            yield f"--quantize {scheme}", replace(question, options=replace(options, quantize=scheme))
        prefix, options = "--device-map cpu", replace(options, device_map="cpu", offload="auto", quantize="none")
        yield prefix, replace(question, options=options)
    for scheme in finer:
        other = replace(question, options=replace(options, quantize=scheme))
        yield f"{prefix} --quantize {scheme}".lstrip(), other


def _better(question: Question) -> str | None:
    """The nearest alternative that keeps every weight beside its processor, if it is faster; else the fastest."""
    plan = question.plan
    if plan.resident:
        return None
    others = [(flags, other.plan) for flags, other in alternatives(question)]
    faster = [(flags, other) for flags, other in others if tokens_per_s(other) > WORTH_IT * tokens_per_s(plan)]
    for flags, other in faster:
        if other.resident:
            return f"{flags} would fit {_place(other)}: predicted, at most {rate(tokens_per_s(other))} tokens/s"
    if not faster:
        return None
    flags, other = max(faster, key=lambda pair: tokens_per_s(pair[1]))
    return f"{flags} would be faster: predicted, at most {rate(tokens_per_s(other))} tokens/s"


def _by_use(plan: LoadPlan) -> str:
    """Which experts the GPUs have, and what that is worth."""
    if not any(map(sum, plan.use)):
        return "the experts of most use will lie on the GPU; no use was counted yet (replies count it, and dbrx trace)"
    on_cpu = sum(layer.cpu_share for layer in plan.layers) / len(plan.layers)
    of_all = plan.on_cpu / (len(plan.layers) * plan.sizes.n_experts)
    return f"{1 - of_all:.0%} of the experts lie on the GPU, those of most use: {1 - on_cpu:.0%} of the choices so far"


def _place(plan: LoadPlan) -> str:
    used = {layer.device for layer in plan.layers}
    if used == {"cpu"}:
        return "the CPU's memory"
    gpus = "one GPU" if len(used) == 1 else f"{len(used)} GPUs"
    return f"{gpus} and the CPU's memory" if plan.on_cpu else f"on {gpus}"


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
    stored: Stored
    experts: Sequence[Sequence[Extent]] = ()
    use: Counts = ()  # of its experts so far


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
            return Found(official(), Stored())
        path = resolve(name, revision=revision, patterns=["config.json"])
        return Found(DbrxConfig.from_json(path / "config.json"), Stored())
    from model.formats import open_weights

    with open_weights(path) as weights:
        config = weights.config
        places = product(range(config.n_layers), range(config.ffn_config.moe_num_experts))
        extents = [weights.expert_extents(layer, expert) for layer, expert in places]
        return Found(config, Stored.of(weights), extents, use_of(path))
