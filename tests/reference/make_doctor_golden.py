"""Print the logits that dbrx_cli/golden.py expects, computed by transformers 4.57.6 (see README.md)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import DbrxConfig, DbrxForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from dbrx_cli import golden

config = DbrxConfig(**golden.CONFIG, attn_implementation="eager")
network = DbrxForCausalLM(config).eval()
missing = network.load_state_dict({k: torch.from_numpy(v) for k, v in golden.make_weights().items()}, strict=True)
with torch.no_grad():
    logits = network.double()(torch.tensor([golden.IDS])).logits[0, -1]
print(", ".join(f"{x:.4f}" for x in logits.tolist()))
