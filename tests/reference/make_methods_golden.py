"""Add a release's public methods of DBRX's classes to tests/data/transformers_methods.json, by our class's name.

other/bin/python tests/reference/make_methods_golden.py
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from torch import nn
from transformers import DbrxConfig, DbrxForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[1] / "data" / "transformers_methods.json"
CLASSES = {"DbrxConfig": DbrxConfig, "DbrxForCausalLM": DbrxForCausalLM, "Tokenizer": PreTrainedTokenizerFast}


def main() -> None:
    known = json.loads(DATA.read_text("utf-8")) if DATA.exists() else {name: [] for name in CLASSES}
    for name, theirs in CLASSES.items():
        inherited = set(dir(nn.Module)) if name == "DbrxForCausalLM" else set()
        public = {each for each in dir(theirs) if not each.startswith("_")} - inherited
        methods = {each for each in public if inspect.isroutine(getattr(theirs, each))}
        known[name] = sorted({*known[name], *methods})
    DATA.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
