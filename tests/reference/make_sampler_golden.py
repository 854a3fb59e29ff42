"""Make tests/data/sampler_golden.*: what transformers' logits processors do to random logits.

    ref/bin/python tests/reference/make_sampler_golden.py     (environment: make_network_golden.py)

Order, as in `generate`: repetition penalty, temperature, top-k, top-p, min-p. Conventions that the data fixes:

- repetition penalty: a positive logit of a seen token is divided, a negative one multiplied;
- top-k keeps every token that ties with the k-th;
- top-p keeps the token that crosses p, and renormalises over what top-k left;
- min-p keeps tokens whose probability is at least min_p times the largest;
- a token that is cut has the logit -inf; the others keep theirs (after penalty and temperature).

Which of several tokens with the same logit top-p keeps is an accident of sorting: such cases say
`top_p_cuts_a_tie`, and only the number of tokens and their logits are to be compared.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

DATA = Path(__file__).resolve().parents[1] / "data"
REFERENCE = "4.57.6"

FILTERS = [
    {"temperature": 0.05},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 100000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 7, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.1},
]
PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"repetition_penalty": 1.1, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


def make_logits() -> dict[str, Tensor]:
    """Several sizes and shapes of distribution, [vocab] each."""
    random = np.random.RandomState(14)
    logits = {
        "ten": random.standard_normal(10) * 2,
        "flat": random.standard_normal(257) * 0.5,
        "peaked": random.standard_normal(1000) * 4,
        "large": random.standard_normal(3001) * 2,
        "integers": np.round(random.standard_normal(64) * 1.5),  # many ties, some logits exactly 0
        "all_equal": np.zeros(32),
        "masked": np.where(random.uniform(size=100) < 0.4, -np.inf, random.standard_normal(100) * 2),
    }
    return {name: torch.from_numpy(values.astype(np.float32)) for name, values in logits.items()}


def apply(logits: Tensor, seen: list[int], params: dict[str, Any]) -> list[Tensor]:
    """Logits [vocab] after each step: penalty, temperature, top-k, top-p, min-p."""
    ids = torch.tensor([seen], dtype=torch.long)
    steps = [logits[None]]
    for processor in (
        RepetitionPenaltyLogitsProcessor(float(params["repetition_penalty"])) if seen else None,
        TemperatureLogitsWarper(params["temperature"]) if "temperature" in params else None,
        TopKLogitsWarper(params["top_k"]) if "top_k" in params else None,
        TopPLogitsWarper(params["top_p"]) if "top_p" in params else None,
        MinPLogitsWarper(params["min_p"]) if "min_p" in params else None,
    ):
        steps.append(processor(ids, steps[-1].clone()) if processor else steps[-1])
    return [step[0] for step in steps[1:]]


def check_top_p(before: Tensor, after: Tensor, top_p: float) -> bool:
    """Whether a tie was cut; fails where another order of summation could keep another number of tokens."""
    probs = before.double().softmax(-1).sort(descending=True).values
    mass_before = probs.cumsum(-1) - probs
    kept = int(after.isfinite().sum())
    assert kept == int((mass_before < top_p).sum()), "the reference's rounding decided"
    distance = (mass_before - top_p).abs().min().item()
    assert distance > 1e-5 or distance == 0, f"too near the edge: {distance}"
    cut = before[after.isneginf()]
    return bool(cut.numel()) and bool((cut.max() == after[after.isfinite()].min()) & cut.max().isfinite())


def main() -> None:
    """Write the tensors and the list of cases."""
    if transformers.__version__ != REFERENCE:
        sys.exit(f"needs transformers {REFERENCE}, not {transformers.__version__}")
    torch.set_num_threads(1)
    all_logits = make_logits()
    random = np.random.RandomState(15)
    tensors, cases = {f"logits.{name}": value for name, value in all_logits.items()}, []
    for name, logits in all_logits.items():
        for params in FILTERS + PENALTIES:
            penalty = "repetition_penalty" in params
            seen = sorted({int(i) for i in random.randint(0, len(logits), len(logits) // 3)}) if penalty else []
            steps = apply(logits, seen, params)
            tie = "top_p" in params and check_top_p(steps[2], steps[3], params["top_p"])
            for before, after in pairwise(steps[1:]):
                assert torch.equal(after[after.isfinite()], before[after.isfinite()])
            if penalty:
                tensors[f"seen.{len(cases)}"] = torch.zeros(len(logits), dtype=torch.bool)
                tensors[f"seen.{len(cases)}"][seen] = True
                tensors[f"penalized.{len(cases)}"] = steps[0]
            tensors[f"filtered.{len(cases)}"] = steps[-1]
            cases.append({"logits": name, "params": params, "top_p_cuts_a_tie": tie})
    save_file({name: value.clone() for name, value in tensors.items()}, DATA / "sampler_golden.safetensors")
    golden = {
        "made_by": "tests/reference/make_sampler_golden.py",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "notes": "Case i: logits.<logits> -> penalized.<i> (where there is a penalty; seen.<i>) -> filtered.<i>. "
        "Conventions: see the script.",
        "cases": cases,
    }
    text = json.dumps(golden, indent=1)
    (DATA / "sampler_golden.json").write_text(text + "\n", "utf-8")
    print(len(cases), "cases,", sum(case["top_p_cuts_a_tie"] for case in cases), "of them cut a tie")


if __name__ == "__main__":
    main()
