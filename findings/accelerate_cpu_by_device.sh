#!/bin/sh
# accelerate 1.15.0: dispatch_model's device_map may hold torch.device objects by its annotation, but it looks for the CPU by comparing
# with the word "cpu", which torch.device("cpu") does not equal. A module that is mapped to "cpu" beside another device is offloaded: its
# weights wait there and it computes on the main device. Mapped to torch.device("cpu") it computes on the CPU, without a word.
# The main device is "meta" here, so no GPU is needed. Seen: "word: offload True, computes on meta", "object: offload False, computes on cpu".
# Exits 1 if that changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import torch
from accelerate import dispatch_model

for name, cpu in ("word", "cpu"), ("object", torch.device("cpu")):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    dispatch_model(net, {"0": cpu, "1": "meta"}, main_device="meta", force_hooks=True)
    hook = net[0]._hf_hook
    print(f"{name}: offload {hook.offload}, computes on {hook.execution_device}")
PY
"$work/venv/bin/python" "$work/try.py" 2>/dev/null | tee "$work/told"
grep -qx "word: offload True, computes on meta" "$work/told"
grep -qx "object: offload False, computes on cpu" "$work/told"
