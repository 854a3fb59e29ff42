"""Commands that show and change settings."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from dbrx_cli.options import lookup_length
from dbrx_cli.repl.words import quote
from model.errors import InputError
from model.foreign_text import on_one_line
from model.sampling import SamplingParams

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl

TYPES = {f.name: str(f.type) for f in fields(SamplingParams)}
NAMES = (*TYPES, "stop", "markdown")
SWITCH = {"on": True, "off": False}


def assign(repl: Repl, argument: str) -> None:
    if not argument:
        for name in NAMES:
            repl.report.line(f"{name:20}{current(repl, name)}")
        return
    given, _, value = argument.partition(" ")
    name, value = given.replace("-", "_"), value.strip()
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise InputError(f"there is no setting {given}", f"did you mean {near[0]}?" if near else "/set lists them")
    if not value:
        repl.report.line(f"{name} is {current(repl, name)}")
        return
    if name == "stop":
        repl.stop = () if value == "none" else (value,)
    elif name == "markdown":
        if value not in SWITCH:
            raise InputError(f"markdown is on or off, not {value}")
        repl.markdown = SWITCH[value]
    else:
        try:
            repl.params = replace(repl.params, **{name: _parse(repl, name, value)})
        except ValueError as error:
            raise InputError(str(error)) from None
    repl.report.notice(f"{name} is now {current(repl, name)}")


def current(repl: Repl, name: str) -> str:
    """A setting as it would be typed."""
    if name == "stop":
        return " ".join(quote(text) for text in repl.stop) or "none"
    if name == "markdown":
        return "on" if repl.markdown else "off"
    value = getattr(repl.params, name)
    if value is None:
        return "none" if name == "seed" else "the server's default"
    return str(value)


def show(repl: Repl, argument: str) -> None:
    rows = {"model": on_one_line(repl.name), "context": f"{repl.engine.context} tokens"}
    if repl.last:
        rows |= {"attention": repl.last.attn, "dtype": repl.last.dtype, "quantize": repl.last.quantize}
    if repl.recorder.id is not None:
        rows["session"] = str(repl.recorder.id)
    system = repl.conversation.system
    rows["system message"] = "the checkpoint's default" if system is None else quote(system, repl.columns - 24)
    rows |= {name: current(repl, name) for name in NAMES}
    for name, value in rows.items():
        repl.report.line(f"{name:20}{value}")


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
