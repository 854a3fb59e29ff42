"""How routing looks: a heat map and a table of figures in the terminal, one object as JSON, one HTML page."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from rich.color import Color
from rich.color_triplet import ColorTriplet
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from model.trace import Floats, Trace, entropy, layer_hit_rates, lookahead, reuse, usage, whole_hit_rates

# From dark to light with even steps of brightness, so that the map can be read without its colours, too.
RAMP = np.array([(8, 8, 20), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)])
SHADES, ASCII_SHADES = "·░▒▓█", ".:+*#"
CACHE_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
LABEL = "layer"
FIGURES = ("used", "reuse")  # beside the map, where there is room
FIGURE_WIDTH = 7


def heat_map(trace: Trace, width: int | None = None) -> Group:
    """Experts by layers, coloured by the share of tokens that chose them, and its legend; `width` columns at most.

    Where every token uses every expert there is nothing to show, and that is said instead.
    """
    if word := plain_word(trace):
        return Group(Text(word))
    shares = usage(trace)
    return Group(_Map(trace, shares, width), _Legend(trace, float(shares.max()), width))


def figures(trace: Trace) -> Table:
    """What the map means: how many experts are in use, how often they come again, and what a cache would save."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    effective, again = 2 ** entropy(usage(trace)), reuse(trace.expert_ids)
    low = int(effective.argmin())
    table.add_row("experts in use", f"{effective.mean():.1f} a layer, fewest {effective[low]:.1f} in layer {low}")
    if trace.chooses:
        chance = trace.top_k / trace.n_experts
        table.add_row("seen the token before", f"{again.mean():.0%} of a token's experts, by chance {chance:.0%}")
        if trace.n_layers > 1:
            early = f"{lookahead(trace).mean():.0%} of them, by the next router on this state"
            table.add_row("foreseen a layer before", early)
        total, rates = trace.n_layers * trace.n_experts, whole_hit_rates(trace)
        for size in (round(share * total) for share in CACHE_SHARES):
            table.add_row(f"cache of {size}", f"holds {rates[size]:.0%} of them, {_bytes(size * trace.expert_bytes)}")
    return table


def title(trace: Trace, model: str, prompt_tokens: int) -> str:
    """One line that says what was traced."""
    reply = len(trace.ids) - prompt_tokens
    tokens = f"{len(trace.ids)} tokens" + (f" ({prompt_tokens} of the prompt, {reply} of the reply)" if reply else "")
    return f"{model}: {tokens}, {trace.n_layers} layers, {trace.top_k} of {trace.n_experts} experts a token"


def plain_word(trace: Trace) -> str | None:
    """What has to be said where nothing is chosen."""
    if trace.chooses:
        return None
    return f"this model chooses nothing: every token uses all {trace.n_experts} experts of every layer"


def to_dict(trace: Trace, tokens: Sequence[dict[str, Any]], model: str, revision: str | None) -> dict[str, Any]:
    """The object of `--json` (docs/trace.md). tokens: id, text, special and part ("prompt", "reply") of each."""
    shares = usage(trace)
    return {
        "model": model,
        "revision": revision,
        "layers": trace.n_layers,
        "experts": trace.n_experts,
        "top_k": trace.top_k,
        "expert_bytes": trace.expert_bytes,
        "tokens": list(tokens),
        "chosen": trace.expert_ids.tolist(),
        "weights": _rounded(trace.router_weights),
        "usage": _rounded(shares),
        "entropy_bits": _rounded(entropy(shares)),
        "reuse": _rounded(reuse(trace.expert_ids)),
        "lookahead": _rounded(lookahead(trace)),
        "hit_rate": {"layer": _rounded(layer_hit_rates(trace)), "whole": _rounded(whole_hit_rates(trace))},
    }


def html_page(values: dict[str, Any]) -> str:
    """One page that needs nothing else: the values of `to_dict` in a template that shows them.

    The values are data, never markup: the page's own script sets them as text, and its policy forbids every other
    script, style and request.
    """
    template = files(__package__).joinpath("routing.html").read_text("utf-8")
    for kind in ("style", "script"):  # the policy names both by their checksums
        start = template.index(f"<{kind}>") + len(f"<{kind}>")
        content = template[start : template.index(f"</{kind}>", start)]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        template = template.replace(f"@{kind}-hash@", f"sha256-{digest}")
    data = json.dumps(values, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.replace("@data@", data)


@dataclass(frozen=True)
class _Map:
    trace: Trace
    shares: Floats
    width: int | None

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, self.width or options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = min(self.width or options.max_width, options.max_width)
        experts, layers = self.trace.n_experts, self.trace.n_layers
        label = max(len(LABEL), len(str(layers - 1))) + 1
        beside = len(FIGURES) * FIGURE_WIDTH
        if columns - label - beside < 2 * experts:
            beside = 0
        cell = max(1, min(4, (columns - label - beside) // experts))
        group = -(-experts * cell // max(1, columns - label - beside))  # more experts than columns: neighbours share
        # The busiest of the neighbours, as an average would hide it.
        starts = range(0, experts, group)
        shown = np.stack([self.shares[:, start : start + group].max(1) for start in starts], 1)
        dim = Style(dim=True)
        yield Segment(LABEL.ljust(label), dim)
        yield Segment(_heads([str(start) for start in starts], cell), dim)
        yield Segment("".join(name.rjust(FIGURE_WIDTH) for name in FIGURES) if beside else "", dim)
        yield Segment.line()
        effective, again = 2 ** entropy(self.shares), reuse(self.trace.expert_ids)
        for layer in range(layers):
            yield Segment(str(layer).rjust(label - 1) + " ", dim)
            for share in shown[layer]:
                yield _cell(share, float(self.shares.max()), cell, console, options)
            if beside:
                yield Segment(f"{effective[layer]:{FIGURE_WIDTH}.1f}{again[layer]:{FIGURE_WIDTH}.0%}")
            yield Segment.line()


@dataclass(frozen=True)
class _Legend:
    trace: Trace
    most: float
    width: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = min(self.width or options.max_width, options.max_width)
        steps = max(5, min(20, columns - 30))
        even = self.trace.top_k / self.trace.n_experts
        yield Segment("chosen by 0 ")
        for i in range(steps):
            yield _cell(self.most * i / (steps - 1), self.most, 1, console, options)
        yield Segment(f" {self.most:.0%}")
        if columns >= steps + 60:
            yield Segment(f" of the tokens (if all were alike: {even:.0%})", Style(dim=True))
        yield Segment.line()


def _cell(share: float, most: float, width: int, console: Console, options: ConsoleOptions) -> Segment:
    """One cell: a coloured field, with its percentage where that fits; shades where there are no colours."""
    level = share / most if most else 0.0
    number = f"{share:.0%}"[:-1] if share else ""
    if console.color_system is None or console.no_color:
        shades = ASCII_SHADES if options.ascii_only or console.is_dumb_terminal else SHADES
        shade = shades[min(len(shades) - 1, int(level * len(shades)))] if share else " "
        return Segment(number.rjust(width - 1) + " " if width == 4 else shade * width)
    background = _colour(level)
    ink = "black" if level > 0.6 else "white"
    text = number.rjust(width - 1) + " " if width == 4 else " " * width
    return Segment(text, Style(color=ink, bgcolor=Color.from_triplet(background)))


def _colour(level: float) -> ColorTriplet:
    """0 to 1 -> a colour of the ramp."""
    at = min(max(level, 0.0), 1.0) * (len(RAMP) - 1)
    red, green, blue = (int(np.interp(at, range(len(RAMP)), RAMP[:, channel])) for channel in range(3))
    return ColorTriplet(red, green, blue)


def _heads(names: list[str], cell: int) -> str:
    """Numbers above their columns, as many as fit without touching."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 1024) if step * cell > max(map(len, names)))
    line = ""
    for i in range(0, len(names), step):
        line += names[i].rjust(cell - 1).ljust(cell * step) if cell > 2 else names[i].ljust(cell * step)
    return line[: cell * len(names)].ljust(cell * len(names))


def _rounded(values: Any) -> Any:
    return np.round(np.asarray(values, np.float64), 4).tolist()


def _bytes(n_bytes: int) -> str:
    from model.hub.plan import readable

    return readable(n_bytes)


def token_texts(pieces: Sequence[bytes]) -> Iterator[str]:
    """Text for each token alone; the bytes of a part of a character are spelled out."""
    for piece in pieces:
        try:
            yield piece.decode("utf-8")
        except UnicodeDecodeError:
            yield "".join(f"\\x{byte:02x}" for byte in piece)
