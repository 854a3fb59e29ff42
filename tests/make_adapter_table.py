"""The table of adapter options in docs/formats.md, from the code: `make docs` writes it, a test compares it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from model.adapter_config import FOLLOWED, PLAIN, WITHOUT_EFFECT, Plain

FORMATS = Path(__file__).parent.parent / "docs" / "formats.md"
BEGIN, END = "<!-- adapter table -->\n", "<!-- end of adapter table -->\n"


def table() -> str:
    """Markdown: a row an option, in the order of their names."""
    rows = {name: f"any value: {what} | | |" for name, what in WITHOUT_EFFECT.items()}
    rows |= {name: f"followed: {what} | | |" for name, what in FOLLOWED.items()}
    for name, plain in PLAIN.items():
        values = ", ".join(f"`{json.dumps(value)}`" for value in plain.values)
        rows[name] = f"{values} | {plain.others} | {_way_out(plain)} |"
    lines = ["| option | understood | any other value is refused: it | way out |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {rows[name]}" for name in sorted(rows))]) + "\n"


def _way_out(plain: Plain) -> str:
    if isinstance(plain.way_out, str):
        return plain.way_out
    by_hint: dict[str, list[str]] = {}
    for value, hint in plain.way_out.items():
        by_hint.setdefault(hint, []).append(f"`{value}`" if value else "others")
    return "; ".join(f"{', '.join(values)}: {hint}" for hint, values in by_hint.items())


def page() -> str:
    """docs/formats.md with the table as it is now."""
    text = FORMATS.read_text("utf-8")
    return re.sub(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", lambda _: table(), text, flags=re.DOTALL)


if __name__ == "__main__":
    FORMATS.write_text(page(), "utf-8")
