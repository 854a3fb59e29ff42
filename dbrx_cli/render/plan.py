"""A plan as people read it: a bar a device, a table of what a token waits for, sentences of what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from dbrx_cli.planning import Question, rate, seconds
from model.foreign_text import on_one_line
from model.load_plan import LoadPlan
from model.placement import Device, Layer, parameters
from model.speed import load_s, tiers, tokens_per_s

if TYPE_CHECKING:
    from rich.console import RenderableType

# What fills a bar, and how it looks with and without colour.
FILLS = (("weights", "█", "cyan"), ("experts' cache", "▓", "blue"), ("KV cache", "▒", "magenta"), ("free", "·", "dim"))

DISK = ("experts on disk", "░", "yellow")
NO_BREAK = "\N{NO-BREAK SPACE}"  # so that a name in the legend stays on its line


def show(console: Console, question: Question, advice: Iterable[str]) -> None:
    """All that there is to say of a plan."""
    plan = question.plan
    name = plan.format + ("" if plan.format == plan.dtype else f", activations {plan.dtype}")
    count = parameters(question.config) / 1e9
    console.print(
        Text(f"{on_one_line(question.name)}: {count:.3g} billion parameters, {decimal(plan.sizes.total)} in {name}")
    )
    if plan.runs:
        console.print(picture(plan, console.width))
        console.print(waits(plan))
        speed, load = rate(tokens_per_s(plan)), seconds(load_s(plan))
        predicted = question.predicted
        about = f"about {rate(predicted)} tokens/s, " if predicted else "predicted, with nothing measured: "
        reach = f"at most {speed} tokens/s; loading takes at least {load}"
        console.print(Text(f"{about}{reach}; room for a context of {plan.context} tokens"))
    for sentence in advice:
        item = Table.grid(padding=(0, 1))
        item.add_row("-", Text(sentence))
        console.print(item)


def picture(plan: LoadPlan, width: int) -> RenderableType:
    """A bar for each device, filled with what lies there, and the layers' names."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)  # the bar: what stands beside it gives way
    room = max(8, min(40, width - 60))
    for device in _devices(plan):
        grid.add_row(device.name, _bar(plan, device, room), _sizes(plan, device), _layers(plan, device))
    if plan.on_disk:
        streamed = plan.on_disk * plan.sizes.experts
        where = _ranges(plan, lambda layer: layer.experts == "disk")
        grid.add_row("disk", Text(DISK[1] * room, DISK[2]), decimal(streamed), f"experts of layers {where}")
    legend = Text()
    for name, glyph, style in (*FILLS, *([DISK] if plan.on_disk else [])):
        legend.append(glyph, style).append(f" {name}".replace(" ", NO_BREAK)).append("  ")
    return Group(grid, legend)


def waits(plan: LoadPlan) -> RenderableType:
    """The seconds of one token, by what is read."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, side in (("a token reads", "left"), ("bytes", "right"), ("seconds", "right")):
        table.add_column(heading, justify="right" if side == "right" else "left", no_wrap=True)
    for tier in tiers(plan):
        table.add_row(tier.what, decimal(tier.nbytes), f"{tier.seconds:.3g}")
    return table


def _devices(plan: LoadPlan) -> list[Device]:
    machine = plan.machine
    cpu_used = plan.weights.get("cpu")
    return [*machine.gpus, *([machine.cpu] if cpu_used or not machine.gpus else [])]


def _bar(plan: LoadPlan, device: Device, width: int) -> Text:
    amounts = (
        plan.weights.get(device.name, 0),
        plan.cache_on(device),
        plan.kv.get(device.name, 0),
        max(0, plan.free(device)),
    )
    whole = sum(amounts) or 1
    bar, filled, total = Text(), 0, 0
    for amount, (_, glyph, style) in zip(amounts, FILLS, strict=True):
        total += amount
        end = round(width * total / whole)
        bar.append(glyph * (end - filled), style)
        filled = end
    return bar


def _sizes(plan: LoadPlan, device: Device) -> str:
    return f"{decimal(device.memory - max(0, plan.free(device)))} of {decimal(device.memory)}"


def _layers(plan: LoadPlan, device: Device) -> str:
    """What lies on a device, in words."""
    name = device.name
    kinds: tuple[tuple[str, Callable[[Layer], bool]], ...] = (
        ("layers {}", lambda layer: layer.device == layer.experts == name),
        ("layers {} without experts", lambda layer: layer.device == name != layer.experts),
        ("experts of layers {}", lambda layer: layer.experts == name != layer.device),
    )
    parts = [text.format(where) for text, chosen in kinds if (where := _ranges(plan, chosen))]
    if plan.on_cpu:
        held, every = plan.experts_by_place[name], sum(layer.device == name for layer in plan.layers)
        of_card = f"{held} of {every * plan.sizes.n_experts} experts"
        parts.append(f"{held} experts, computed here" if name == "cpu" else of_card)
    if plan.cache_on(device):
        parts.append(f"{plan.hits:.0%} of the other experts")
    return ", ".join(parts)


def _ranges(plan: LoadPlan, chosen: Callable[[Layer], bool]) -> str:
    """Layer numbers such as 0-9, 12; empty if there are none."""
    runs: list[list[int]] = []
    for i, layer in enumerate(plan.layers):
        if not chosen(layer):
            continue
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
