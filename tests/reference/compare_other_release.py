"""Print how far another release of transformers is from the golden data, one row a config.

    other/bin/python tests/reference/compare_other_release.py

It loads each model as a user does, with from_pretrained on a checkpoint's folder. A second column gives the same
after the rotary base that the checkpoint asks for was put in by hand, to tell that fault from others.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from weights import make_checkpoint  # noqa: E402


def difference(name: str, config: dict[str, Any], seed: int, repair: bool) -> str:
    """Largest difference of a logit from the golden one, or the exception."""
    golden = load_file(TESTS / "data" / f"network_{name}.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, config, seed)
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            if repair:
                put_in_rope_theta(model, config)
            logits = model(golden["input_ids"].long()[None]).logits[0, golden["positions"].long()]
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{(logits - golden['logits']).abs().max().item():.2g}"


def put_in_rope_theta(model: Any, config: dict[str, Any]) -> None:
    """Write the frequencies of the config's rope_theta over whatever the rotary modules hold."""
    head_dim = config["d_model"] // config["n_heads"]
    frequencies = config["attn_config"]["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.copy_(frequencies)


@torch.no_grad()
def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"| config | clip_qkv | rope_theta | transformers {transformers.__version__} | with rope_theta put in |")
    print("|---|---|---|---|---|")
    models = json.loads((TESTS / "data" / "network_golden.json").read_text("utf-8"))["models"]
    for name, model in models.items():
        config, attn = model["config"], model["config"]["attn_config"]
        cells = [difference(name, config, model["seed"], repair) for repair in (False, True)]
        print(f"| {name} | {attn['clip_qkv']} | {attn['rope_theta']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
