#!/bin/sh
# transformers 5.24.0 and DBRX's config.json, three surprises in one round trip:
# 1. attn_config.rope_theta, where DBRX has its rotary base, is kept but not used: a second base of 10000 appears at the
#    top level, and that one counts.
# 2. The config.json that 5.24.0 saves is refused by 4.57.6, because of base-class keys inside attn_config.
# 3. The config.json that 4.57.6 takes, with a whole number for moe_normalize_expert_weights, is refused by 5.24.0; the
#    same number for clip_qkv is not.
# Exits 0 while all three are so.
set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/old"
python3 -m venv "$work/new"
"$work/old/bin/pip" install -q transformers==4.57.6
"$work/new/bin/pip" install -q transformers==5.24.0
cat > "$work/save.py" <<'PY'
import sys
from transformers import DbrxConfig
config = DbrxConfig(attn_config={"rope_theta": 500000.0, "clip_qkv": 8})
config.save_pretrained(sys.argv[1])
print("attn_config:", config.attn_config.rope_theta, "rope_parameters:", config.rope_parameters)
assert config.attn_config.rope_theta == 500000 and config.rope_parameters["rope_theta"] == 10000
PY
cat > "$work/refuse.py" <<'PY'
import sys
from transformers import DbrxConfig
try:
    DbrxConfig.from_pretrained(sys.argv[1])
except Exception as error:
    text = f"{type(error).__name__}: {error}".replace("\n", " ")
    print("refused:", text[:160])
    assert sys.argv[2] in text
else:
    sys.exit("was read")
PY
cat > "$work/whole.py" <<'PY'
import json, sys
from transformers import DbrxConfig
folder = sys.argv[1]
DbrxConfig(attn_config={"rope_theta": 500000.0, "clip_qkv": 8}).save_pretrained(folder)
values = json.load(open(f"{folder}/config.json"))
values["ffn_config"]["moe_normalize_expert_weights"] = 1
json.dump(values, open(f"{folder}/config.json", "w"))
print("4.57.6 reads it:", DbrxConfig.from_pretrained(folder).ffn_config.moe_normalize_expert_weights)
PY
"$work/new/bin/python" "$work/save.py" "$work/by_new" 2> "$work/log"
"$work/old/bin/python" "$work/refuse.py" "$work/by_new" "_name_or_path" 2> "$work/log"
"$work/old/bin/python" "$work/whole.py" "$work/by_old" 2> "$work/log"
"$work/new/bin/python" "$work/refuse.py" "$work/by_old" "moe_normalize_expert_weights" 2> "$work/log"
