#!/bin/sh
# peft 0.21.2: the first key of alpha_pattern (and rank_pattern) that matches a module counts, but adapter_config.json is
# saved with sorted keys. So with two keys that match one module, the network that was trained and its reload can have
# different scales: nothing is said, since all shapes fit. Here "out" comes first while training, and "1.out" in the file.
#
# Prints the scale of module 1.out in both. Seen: trained 5.0, reloaded 0.5. Exits 1 if that changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q peft==0.21.2 transformers==5.24.0
cd "$work"
cat > finding.py <<'PYTHON'
import torch
from peft import LoraConfig, PeftModel, get_peft_model


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(16, 16)

    def forward(self, x):
        return self.out(x)


def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(), Block())


config = LoraConfig(r=8, lora_alpha=8, target_modules=["out"], alpha_pattern={"out": 40, "1.out": 4})
trained = get_peft_model(base(), config)
trained.save_pretrained("adapter")
reloaded = PeftModel.from_pretrained(base(), "adapter")
scales = [net.base_model.model[1].out.scaling["default"] for net in (trained, reloaded)]
print(f"trained {scales[0]}, reloaded {scales[1]}")
raise SystemExit(scales != [5.0, 0.5])
PYTHON
"$work/venv/bin/python" finding.py
