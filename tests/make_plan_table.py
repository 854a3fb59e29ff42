"""The table of machines in README.md, from `dbrx plan`'s own arithmetic: `make docs` writes it, a test compares it."""

from __future__ import annotations

import re
from pathlib import Path

from dbrx_cli.planning import Question, alternatives, rate
from model.config import official
from model.load_plan import LoadOptions, LoadPlan, Stored
from model.machine import parse_devices
from model.speed import tokens_per_s

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- plan table -->\n", "<!-- end of plan table -->\n"
# How people describe a machine, and how `--devices` does. The CPU's memory is read at 80 GB/s, files at 7 GB/s.
MACHINES = {
    "8 x 24 GB, 128 GB of memory": "8xRTX4090,cpu=128GiB@80GB/s,disk=7GB/s",
    "4 x 80 GB, 256 GB of memory": "4xH100,cpu=256GiB@80GB/s,disk=7GB/s",
    "2 x 80 GB, 256 GB of memory": "2xH100,cpu=256GiB@80GB/s,disk=7GB/s",
    "1 x 80 GB, 128 GB of memory": "1xH100,cpu=128GiB@80GB/s,disk=7GB/s",
    "1 x 24 GB, 64 GB of memory": "RTX4090,cpu=64GiB@80GB/s,disk=7GB/s",
    "no GPU, 128 GB of memory": "cpu=128GiB@80GB/s,disk=7GB/s",
    "no GPU, 64 GB of memory": "cpu=64GiB@80GB/s,disk=7GB/s",
    "no GPU, 32 GB of memory": "cpu=32GiB@80GB/s,disk=7GB/s",
}
FORMS = ("none", "int8", "int4", "int3")


def table() -> str:
    """Markdown: a row a machine, a column a format, the most tokens a second of what can be run there.

    None of these machines was at hand; the row of one that was says on which card, and when.
    """
    lines = ["| machine | bfloat16 | int8 | int4 | int3 | |", "|---|---|---|---|---|---|"]
    for name, words in MACHINES.items():
        cells = (_cell(*fastest(words, form)) for form in FORMS)
        lines.append(f"| {name} | " + " | ".join(cells) + " | predicted |")
    return "\n".join(lines) + "\n"


def fastest(words: str, form: str) -> tuple[str, LoadPlan]:
    """The fastest way to run a form on a machine: flags, and the plan."""
    options = LoadOptions(pack=True, device_map="auto", offload="auto")
    question = Question("dbrx", official(), Stored(), parse_devices(words), options)
    ways = [("", question), *alternatives(question)]
    plans = {flags: other.plan for flags, other in ways if other.plan.scheme == form}
    return max(plans.items(), key=lambda pair: tokens_per_s(pair[1]))


def _cell(flags: str, plan: LoadPlan) -> str:
    """C: with --device-map cpu, D: experts from the disk, H: those that find no room on a GPU by the CPU."""
    if not plan.runs:
        return "does not fit"
    marks = "C" * ("--device-map cpu" in flags) + "D" * (plan.on_disk > 0) + "H" * (plan.on_cpu > 0)
    return f"{rate(tokens_per_s(plan))} {marks}".rstrip()


def page() -> str:
    """README.md with the table as it is now."""
    text = README.read_text("utf-8")
    return re.sub(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", table(), text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(page(), "utf-8")
