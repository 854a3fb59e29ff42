"""config.json as vLLM wants it, read by this program's own rules.

Which rotary base counts, what a null means and what is refused does not depend on the transformers that is installed:
5.24.0 computes with the base 10,000 whatever attn_config says, and refuses `clip_qkv: null`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import PretrainedConfig

from model.config import DbrxConfig as Parsed


class Part(dict[str, Any]):
    """An object of config.json whose keys are attributes, too: JSON for transformers, `.kv_n_heads` for vLLM."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DbrxConfig(PretrainedConfig):  # type: ignore[misc]
    """DBRX's configuration under the names that vLLM reads."""

    model_type = "dbrx"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(self, **values: Any) -> None:
        parsed = asdict(Parsed.from_dict({key: value for key, value in values.items() if key != "name_or_path"}))
        for name in ("attn_config", "ffn_config"):
            parsed[name] = Part(parsed[name])
        attn, ffn = parsed["attn_config"], parsed["ffn_config"]
        parsed["rope_parameters"] = {"rope_type": "default", "rope_theta": attn["rope_theta"]}
        parsed["num_key_value_heads"] = attn["kv_n_heads"]
        parsed["num_experts"] = ffn["moe_num_experts"]  # vLLM asks the top level whether there are experts
        parsed["num_experts_per_tok"] = ffn["moe_top_k"]
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        super().__init__(**(ends | values | parsed))
