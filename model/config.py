"""DbrxConfig: what config.json says of a checkpoint, as nested frozen dataclasses (no torch needed)."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import ModelError
from .safetensors_file import read_json

# Keys that transformers puts into sub-configs when it saves: they say nothing about the network.
IGNORED_INSIDE = {
    "model_type", "attn_implementation", "transformers_version", "_commit_hash", "torch_dtype", "dtype",
    "_name_or_path", "architectures", "chunk_size_feed_forward", "hidden_size", "id2label", "label2id",
    "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
}  # fmt: skip
# What transformers writes at the top level beside the network's own keys.
IGNORED_AT_TOP = {
    "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "_commit_hash", "attn_implementation", "_attn_implementation", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "num_key_value_heads", "return_dict", "output_hidden_states", "output_attentions",
    "quantization", "quantization_config",  # the formats read them where they know the packing, and refuse others
}  # fmt: skip
LIMIT = 2**31  # of any dimension: a hostile number must fail here, not in a loop over it
ACTIVATIONS = ("silu", "gelu", "relu")

Sub = TypeVar("Sub", bound="DbrxAttentionConfig | DbrxFFNConfig")


@dataclass(frozen=True)
class DbrxAttentionConfig:
    """`attn_config`: grouped-query attention with rotary positions."""

    attn_pdrop: float = 0.0
    clip_qkv: float | None = None  # clamp of the fused projection's output, before the split
    kv_n_heads: int = 1
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        _positive(self, "attn_config", "kv_n_heads", "rope_theta")
        if self.clip_qkv is not None and not self.clip_qkv > 0:
            raise ModelError(f"config: attn_config.clip_qkv must be null or above 0, not {self.clip_qkv}")


@dataclass(frozen=True)
class DbrxFFNConfig:
    """`ffn_config`: the experts and their router."""

    ffn_act_fn: dict[str, Any] | None = field(default_factory=lambda: {"name": "silu"})
    ffn_hidden_size: int = 3584
    moe_num_experts: int = 4
    moe_top_k: int = 1
    moe_jitter_eps: float | None = None  # training only
    moe_loss_weight: float = 0.01
    moe_normalize_expert_weights: float | None = 1.0  # p of the norm that the chosen weights are divided by

    def __post_init__(self) -> None:
        if self.ffn_act_fn is None:
            object.__setattr__(self, "ffn_act_fn", {"name": "silu"})
        _positive(self, "ffn_config", "ffn_hidden_size", "moe_num_experts", "moe_top_k")
        if self.moe_top_k > self.moe_num_experts:
            raise ModelError(
                f"config: ffn_config.moe_top_k is {self.moe_top_k}, but there are {self.moe_num_experts} experts"
            )
        if self.activation not in ACTIVATIONS:
            raise ModelError(
                f"config: ffn_config.ffn_act_fn {self.ffn_act_fn!r} is not supported",
                f"it must name one of {', '.join(ACTIVATIONS)}",
            )

    @property
    def activation(self) -> str | None:
        """The activation's name."""
        return self.ffn_act_fn.get("name", "silu") if isinstance(self.ffn_act_fn, dict) else None


@dataclass(frozen=True)
class DbrxConfig:
    """The network's dimensions and constants, named as in config.json.

    The defaults are those of the model's documentation, not DBRX's own: the real values come from a checkpoint.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    max_seq_len: int = 2048
    vocab_size: int = 32000
    resid_pdrop: float = 0.0
    emb_pdrop: float = 0.0
    attn_config: DbrxAttentionConfig = field(default_factory=DbrxAttentionConfig)
    ffn_config: DbrxFFNConfig = field(default_factory=DbrxFFNConfig)
    use_cache: bool = True
    initializer_range: float = 0.02
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.05  # in every config.json, read by no implementation: moe_loss_weight counts
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("attn_config", DbrxAttentionConfig), ("ffn_config", DbrxFFNConfig)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                object.__setattr__(self, name, _sub_config(kind, name, {} if value is None else value))
        _positive(self, "", "d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size")
        kv_heads = self.attn_config.kv_n_heads
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise ModelError(
                f"config: d_model {self.d_model} does not divide into n_heads {self.n_heads} heads of even size"
            )
        if self.n_heads % kv_heads:
            raise ModelError(f"config: n_heads {self.n_heads} is not a multiple of attn_config.kv_n_heads {kv_heads}")
        if self.tie_word_embeddings:
            raise ModelError("config: tie_word_embeddings is true, which DBRX does not support")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.d_model // self.n_heads

    # The names that generic code written for transformers reads.
    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def num_attention_heads(self) -> int:
        return self.n_heads

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layers

    @property
    def max_position_embeddings(self) -> int:
        return self.max_seq_len

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DbrxConfig:
        """Read a parsed config.json.

        An unknown key inside `attn_config` or `ffn_config` is a `ModelError` (it would change the network), an
        unknown one at the top level a warning (fine-tunes add such keys).
        """
        kind = values.get("model_type", "dbrx")
        if kind != "dbrx":
            raise ModelError(f"config: model_type is {kind!r}, not 'dbrx'", "choose a DBRX checkpoint")
        for scope in (values, values.get("attn_config") or {}):
            for key in ("rope_scaling", "rope_parameters"):
                _check_rope(key, scope.get(key), (values.get("attn_config") or {}).get("rope_theta"))
        known = {f.name for f in fields(cls)}
        dropped = sorted(set(values) - known - IGNORED_AT_TOP - {"rope_scaling", "rope_parameters"})
        if dropped:
            warnings.warn(f"config: ignoring unknown key{'s' * (len(dropped) > 1)} {', '.join(dropped)}", stacklevel=2)
        return cls(**_typed(cls, "", {k: v for k, v in values.items() if k in known}))

    @classmethod
    def from_json(cls, path: str | Path) -> DbrxConfig:
        """Read a config.json; `ModelError` names the file when it cannot be used."""
        path = Path(path)
        if not os.path.lexists(path):
            raise ModelError(
                f"no config.json in {path.parent}", "give the folder of a checkpoint, a Hub id (org/name), or `demo`"
            )
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ModelError as error:
            raise ModelError(f"{path}: {error.message}", error.hint) from None

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that any DBRX program reads."""
        values = asdict(self)
        return {"architectures": ["DbrxForCausalLM"], "model_type": "dbrx", **values}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder/config.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(folder) / "config.json").write_text(text, "utf-8")


def _positive(config: Any, scope: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value < LIMIT:
            raise ModelError(f"config: {f'{scope}.' if scope else ''}{name} must be above 0 and sane, not {value:.6g}")


def _sub_config(kind: type[Sub], name: str, values: Any) -> Sub:
    if not isinstance(values, dict):
        raise ModelError(f"config: {name} must be an object, not {type(values).__name__}")
    values = {k: v for k, v in values.items() if k not in IGNORED_INSIDE | {"rope_scaling", "rope_parameters"}}
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise ModelError(f"config: unknown key {key!r} in {name}", f"known keys: {', '.join(known)}")
    return kind(**_typed(kind, name, values))


def _typed(kind: Any, scope: str, values: dict[str, Any]) -> dict[str, Any]:
    """Numbers where numbers belong, so that a wrong config fails here and not deep inside the network."""
    for f in fields(kind):
        if f.name not in values or f.default is MISSING:
            continue
        value, optional = values[f.name], "None" in str(f.type)
        if value is None and optional:
            continue
        whole = f.type == "int" or f.type is int
        truth = f.type == "bool" or f.type is bool
        fits = isinstance(value, bool) if truth else isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or (whole and value != int(value)):
            name = f"{scope}.{f.name}" if scope else f.name
            raise ModelError(f"config: {name} must be {f.type}, not {value!r}")
        if whole:
            values[f.name] = int(value)
    return values


def _check_rope(key: str, value: Any, theta: Any) -> None:
    """Only DBRX's own rotary positions are supported; a scaled variant would silently give other numbers."""
    if value is None:
        return
    kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else value
    if kind != "default":
        raise ModelError(f"config: {key} {kind!r} is not supported: DBRX uses the default rotary positions")
    other = value.get("rope_theta") if isinstance(value, dict) else None
    if other is not None and theta is not None and other != theta:
        warnings.warn(
            f"config: {key} says rope_theta {other}, attn_config says {theta}; attn_config counts", stacklevel=3
        )


# The models whose repositories are closed: their configuration is known, so that they can be planned for.
OFFICIAL = ("databricks/dbrx-instruct", "databricks/dbrx-base")


def official() -> DbrxConfig:
    """DBRX as Databricks published it: 132 B parameters."""
    return DbrxConfig(
        d_model=6144,
        n_heads=48,
        n_layers=40,
        max_seq_len=32768,
        vocab_size=100352,
        attn_config=DbrxAttentionConfig(clip_qkv=8, kv_n_heads=8, rope_theta=500000),
        ffn_config=DbrxFFNConfig(ffn_hidden_size=10752, moe_num_experts=16, moe_top_k=4, moe_jitter_eps=0),
    )
