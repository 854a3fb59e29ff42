"""Add what a release of transformers writes of one DBRX configuration to tests/data/transformers_configs.json.

    other/bin/python tests/reference/make_config_golden.py

Run it in an environment for each release; no torch is needed. `saved` is the config.json of save_pretrained, `dumped`
all that to_dict gives, as some programs write it, and `theta_in_rope_parameters` (releases 5) the config.json of a
configuration that was given its rotary base as those releases read it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import DbrxConfig

DATA = Path(__file__).resolve().parents[1] / "data" / "transformers_configs.json"
SIZES = {"d_model": 96, "n_heads": 6, "n_layers": 2, "max_seq_len": 512, "vocab_size": 320}
FFN = {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2}


def saved(config: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads(Path(folder, "config.json").read_text("utf-8"))


def main() -> None:
    attn = {"clip_qkv": 8, "kv_n_heads": 2}
    config = DbrxConfig(**SIZES, attn_config=attn | {"rope_theta": 500000.0}, ffn_config=FFN)
    made = {"saved": saved(config), "dumped": json.loads(json.dumps(config.to_dict(), default=str))}
    if transformers.__version__.startswith("5."):
        rope = {"rope_type": "default", "rope_theta": 500000.0}
        config = DbrxConfig(**SIZES, attn_config=attn, ffn_config=FFN, rope_parameters=rope)
        made["theta_in_rope_parameters"] = saved(config)
    known = json.loads(DATA.read_text("utf-8")) if DATA.exists() else {}
    known[transformers.__version__] = made
    lines = [f"{json.dumps(release)}: {json.dumps(known[release])}" for release in sorted(known)]
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
