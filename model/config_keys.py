"""Keys of config.json as other programs write them: which say nothing, where the rotary base stands, what to refuse."""

from __future__ import annotations

import re
import warnings
from typing import Any

from .errors import ModelError
from .safetensors_file import shown

# What transformers' base class of all configurations holds, in any release from 4.40 to 5.24. Programs dump it at the
# top level and into attn_config and ffn_config; it says nothing about the network.
BASE_CLASS = {
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
    "_experts_implementation", "_experts_implementation_internal", "_name_or_path", "_output_attentions",
    "add_cross_attention", "architectures", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "experts_implementation", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length",
    "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix",
    "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_last_hidden_states", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache", "use_return_dict",
}  # fmt: skip
# Harmless as long as they are false or empty; else they would change the network. The first is of the code of 2024.
HARMLESS_IF_EMPTY = {"uniform_expert_assignment", "pruned_heads", "per_layer_config"}
ROPE_OBJECTS = ("rope_scaling", "rope_parameters")  # where both stand, transformers takes the first
ROPE_KEYS = {*ROPE_OBJECTS, "rope_theta"}
DEFAULT_BASE = 10000.0
# transformers' attribute_map: the names that generic code uses, and our own.
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "max_position_embeddings": "max_seq_len",
}
# transformers before 5.15 multiplied by an expert's w1 and v1 as they are stored, not by their transposes.
TRANSPOSED = re.compile(r"5\.(\d|1[0-4])(\D|$)")


def own_names(values: dict[str, Any]) -> dict[str, Any]:
    """The top level with our names for transformers' general ones; where both stand, ours counts."""
    aliased = {ALIASES[key]: value for key, value in values.items() if key in ALIASES}
    return aliased | {key: value for key, value in values.items() if key not in ALIASES}


def rope_bases(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary base by the places of a parsed config.json that name one; the first counts.

    Releases 4 of transformers keep it in attn_config, 5 in an object at the top level; 5 also leaves 10000 there
    beside another base in attn_config, which the weights were trained with. `ModelError` for positions other than
    DBRX's own.
    """
    attn = values.get("attn_config") or {}
    said = {"attn_config.rope_theta": attn.get("rope_theta")}
    for scope, prefix in ((attn, "attn_config."), (values, "")):
        for key in ROPE_OBJECTS:
            said[f"{prefix}{key}.rope_theta"] = _base_inside(f"{prefix}{key}", scope.get(key))
    said["rope_theta"] = values.get("rope_theta")
    found = {place: base for place, base in said.items() if base is not None}
    for place, base in found.items():
        if isinstance(base, bool) or not isinstance(base, int | float):
            raise ModelError(f"config: {place} must be a number, not {shown(repr(base))}")
    return found


def rope_base(values: dict[str, Any], where: str) -> Any:
    """The rotary base that counts; a warning that begins with `where` if another place names another one."""
    (place, base), *others = (rope_bases(values) or {"": DEFAULT_BASE}).items()
    for other, value in others:
        if value != base:
            text = f"{where}: {place} is {shown(str(base))} and {other} {shown(str(value))}; the former counts"
            warnings.warn(text, stacklevel=4)
            break
    return base


def _base_inside(place: str, value: Any) -> Any:
    """The base that a rope_scaling or rope_parameters names; a scaled variant would silently give other numbers."""
    if value is None:
        return None
    kind, base = value, None
    if isinstance(value, dict):
        kind, base = value.get("rope_type", value.get("type", "default")), value.get("rope_theta")
        kind = next((name for name, each in value.items() if isinstance(each, dict)), kind)  # by type of layer
    if kind != "default":
        raise ModelError(
            f"config: {place} {shown(repr(kind))} is not supported: DBRX uses the default rotary positions"
        )
    return base


def require_untransposed(values: dict[str, Any]) -> None:
    """`ModelError` for a network whose experts lie transposed and, all widths being equal, look like any others."""
    ffn, version = values.get("ffn_config") or {}, str(values.get("transformers_version"))
    width = values.get("d_model")
    alike = width == ffn.get("ffn_hidden_size") == ffn.get("hidden_size")
    if TRANSPOSED.match(version) and alike:
        raise ModelError(
            f"config: transformers_version is {shown(version)}, and releases 5.0 to 5.14 compute with the experts' "
            "matrices transposed",
            "run it with the release that made it; if the weights come from elsewhere, take transformers_version out",
        )


def refuse_changing(scope: str, values: dict[str, Any]) -> None:
    """`ModelError` for a key that says nothing while it is false or empty, and is not."""
    for key in sorted(HARMLESS_IF_EMPTY & values.keys()):
        if values[key]:
            value = shown(repr(values[key]))
            raise ModelError(f"config: {scope}{key} {value} is not supported: it changes the network")


def listed(names: list[str]) -> str:
    """The first keys of several, and how many there are more."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(shown, names[:8])) + more
