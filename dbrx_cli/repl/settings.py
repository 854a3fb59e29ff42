"""Commands that show and change settings."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from dbrx_cli.engine import REMOTE
from dbrx_cli.options import lookup_length
from dbrx_cli.repl.phrases import quote, words
from model.errors import InputError
from model.foreign_text import on_one_line
from model.sampling import SamplingParams

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl

TYPES = {f.name: str(f.type) for f in fields(SamplingParams)}
SWITCH = {"on": True, "off": False}
MEANINGS = {
    "max_tokens": "longest reply in tokens",
    "temperature": "0 always takes the likeliest, 1 is the model's own; up to 100",
    "top_p": "likeliest tokens of this total mass; 0 to 1",
    "top_k": "likeliest tokens; 0 for all",
    "min_p": "tokens at least this likely against the likeliest; 0 to 1",
    "repetition_penalty": "1 switches it off",
    "frequency_penalty": "by count in the reply; 0 switches it off",
    "presence_penalty": "once for what has occurred; 0 switches it off",
    "lookup": "auto, off, or how many tokens are drafted from the text so far",
    "seed": "same seed, same reply; none draws one",
    "stop": "texts that end the reply, several in quotes; none",
    "markdown": "on or off",
}
NAMES = tuple(MEANINGS)


def assign(repl: Repl, argument: str) -> None:
    if not argument:
        rows = {name: (current(repl, name), MEANINGS[name]) for name in NAMES}
        repl.table({name: f"{f'{value}:':<12} {meaning}" for name, (value, meaning) in rows.items()})
        return
    given, _, value = (part.strip() for part in re.sub(r"^([\w-]+)\s*=", r"\1 ", argument).partition(" "))
    name = given.replace("-", "_")
    if name not in NAMES:
        near = [known for known in NAMES if known.startswith(name)] or difflib.get_close_matches(name, NAMES, n=1)
        raise InputError(f"there is no setting {given}", f"did you mean {near[0]}?" if near else "/set lists them")
    if not value:
        repl.report.line(f"{name} is {current(repl, name)} ({MEANINGS[name]})")
        return
    if name == "stop":
        repl.stop = () if value == "none" else tuple(words(value))
    elif name == "markdown":
        if value not in SWITCH:
            raise InputError(f"markdown is on or off, not {value}")
        repl.markdown = SWITCH[value]
    else:
        try:
            params = replace(repl.params, **{name: _parse(repl, name, value)})
        except ValueError as error:
            raise InputError(str(error)) from None
        if name == "max_tokens" and value != "default" and params.max_tokens > repl.engine.context:
            raise InputError(f"max_tokens {value} is more than the context, {repl.engine.context} tokens")
        repl.params = params
    repl.report.notice(f"{name} is now {current(repl, name)}")


def current(repl: Repl, name: str) -> str:
    """A setting as it would be typed."""
    if name == "stop":
        return " ".join(map(quote, repl.stop)) or "none"
    if name == "markdown":
        return "on" if repl.markdown else "off"
    value = getattr(repl.params, name)
    if value is None:
        return "none" if name == "seed" else "the server's default"
    return "off" if name == "lookup" and value == 0 else str(value)


def show(repl: Repl, argument: str) -> None:
    rows = {"model": on_one_line(repl.name), "context": f"{repl.engine.context} tokens"}
    if repl.last and repl.last.attn != REMOTE:  # a server does not say how it computes
        rows |= {"attention": repl.last.attn, "dtype": repl.last.dtype, "quantize": repl.last.quantize}
    if repl.recorder.id is not None:
        rows["session"] = str(repl.recorder.id)
    system = repl.conversation.system
    rows["system message"] = "the checkpoint's default" if system is None else quote(system, repl.columns - 24)
    rows |= {name: current(repl, name) for name in NAMES}
    repl.table(rows)


def multiline(repl: Repl, argument: str) -> None:
    repl.multiline = not repl.multiline
    repl.report.notice(
        "Enter makes a new line, Alt-Enter sends; /multiline again goes back" if repl.multiline else "Enter sends"
    )


def _parse(repl: Repl, name: str, text: str) -> Any:
    if text == "default":
        return getattr(repl.engine.defaults, name)
    if name == "lookup":
        return lookup_length(text)
    kind = TYPES[name]
    if text == "none" and "None" in kind:
        return None
    for convert, prefix, wanted in ((int, "int", "a whole number"), (float, "float", "a number")):
        if kind.startswith(prefix):
            try:
                return convert(text)
            except ValueError:
                raise InputError(f"{name} must be {wanted}, not {text}") from None
    return text
