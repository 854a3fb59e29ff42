"""Write docs/api.md from the docstrings of `import model`: `make docs`. test_docs.py compares the page with this."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model
from model import generation, loading, tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """\
<!-- written by `make docs` from the docstrings; edit them, or tests/make_api_docs.py, instead -->

# What `import model` offers

Names, arguments and types as they are in the code. [python.md](python.md) has an example, and says of each of
transformers' methods whether it is here.
"""
# What the docstrings of the public names refer to.
BEHIND = {
    "DbrxForCausalLM.from_pretrained": loading.from_pretrained,
    "DbrxForCausalLM.generate": generation.generate,
    "Tokenizer": tokenizer.Tokenizer,
}
KINDS = {property: ", a property", classmethod: ", of the class", staticmethod: ", of the class"}
WIDTH = 100
QUOTES = "'\""  # of an annotation that is text


def page() -> str:
    """The whole page."""
    named = {name: getattr(model, name) for name in model.__all__}
    return "\n".join([HEAD, *(line for name, thing in (named | BEHIND).items() for line in _section(name, thing))])


def _section(name: str, thing: Any) -> Iterator[str]:
    yield from (f"## `{name}`", "", "```python", _signature(name, thing), "```", "", inspect.getdoc(thing) or "", "")
    if not inspect.isclass(thing):
        return
    rows = [(f"`{name}`{kind}", text) for name, kind, text in _members(thing)]
    if rows:
        yield from ("| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows), "")


def _members(thing: type) -> Iterator[tuple[str, str, str]]:
    """Of each public method or property: its name, its kind, the first paragraph of its docstring."""
    for name, member in vars(thing).items():
        inner = getattr(member, "__func__", member)
        text = inspect.getdoc(inner)
        if name.startswith("_") or not text or not (callable(inner) or isinstance(member, property)):
            continue
        kind = next((word for kind, word in KINDS.items() if isinstance(member, kind)), "")
        yield name, kind, " ".join(text.partition("\n\n")[0].split()).replace("|", "\\|")


def _signature(name: str, thing: Any) -> str:
    """On one line, or with a line an argument."""
    arguments = list(_arguments(inspect.signature(thing)))
    one_line = f"{name}({', '.join(arguments)})"
    return one_line if len(one_line) <= WIDTH else "\n".join([f"{name}(", *(f"    {one}," for one in arguments), ")"])


def _arguments(signature: inspect.Signature) -> Iterator[str]:
    named_only = False
    for name, one in signature.parameters.items():
        if name in ("cls", "network"):  # what the method is called on
            continue
        if one.kind is one.KEYWORD_ONLY and not named_only:
            named_only = True
            yield "*"
        stars = "**" if one.kind is one.VAR_KEYWORD else ""
        default = "" if one.default is one.empty else f" = {one.default!r}".replace("<factory>", "...")
        yield f"{stars}{name}: {inspect.formatannotation(one.annotation).strip(QUOTES)}{default}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
