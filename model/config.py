"""DbrxConfig: what config.json says of a checkpoint, as nested frozen dataclasses (no torch needed)."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .absent import absent
from .config_keys import (
    BASE_CLASS,
    DEFAULT_BASE,
    HARMLESS_IF_EMPTY,
    ROPE_KEYS,
    ROPE_OBJECTS,
    listed,
    own_names,
    refuse_changing,
    require_untransposed,
    rope_base,
    rope_bases,
)
from .errors import ModelError
from .safetensors_file import read_json, shown

if TYPE_CHECKING:
    from .formats.gguf_file import GgufFile

# What stands at the top level beside the network's own keys and those of transformers' base class.
IGNORED_AT_TOP = BASE_CLASS | HARMLESS_IF_EMPTY | ROPE_KEYS | {
    "num_key_value_heads",
    # The formats read these where they know the packing, and refuse others.
    "quantization", "quantization_config", "compression_config",
}  # fmt: skip
IGNORED_INSIDE = BASE_CLASS | HARMLESS_IF_EMPTY | {*ROPE_OBJECTS, "hidden_size"}
KINDS = ("dbrx", "dbrx_converted")  # the latter where a tool took the experts apart
# The largest number that float16 holds: it clips nothing, and other programs take it where they fail at null.
NO_CLIP = 65504.0
MAX_BASE = 1e30  # beyond it the angles are no longer numbers of float32
LIMIT = 2**31  # of any dimension: a hostile number must fail here, not in a loop over it
MOST = {"n_layers": 2048, "moe_num_experts": 2048}  # loops go over these; DBRX has 40 and 16
ACTIVATIONS = ("silu", "gelu", "relu")


@dataclass(frozen=True)
class DbrxAttentionConfig:
    """`attn_config`: grouped-query attention with rotary positions."""

    attn_pdrop: float = 0.0
    clip_qkv: float | None = None  # clamp of the fused projection's output, before the split
    kv_n_heads: int = 1
    rope_theta: float = DEFAULT_BASE

    def __post_init__(self) -> None:
        _set_types(self, "attn_config")
        _positive(self, "attn_config", "kv_n_heads")
        if not 1 <= self.rope_theta <= MAX_BASE:
            raise ModelError(f"config: rope_theta must be from 1 to {MAX_BASE:g}, not {self.rope_theta}")
        if self.clip_qkv is not None and not self.clip_qkv > 0:
            raise ModelError(f"config: attn_config.clip_qkv must be null or above 0, not {self.clip_qkv}")
        if self.clip_qkv is not None and self.clip_qkv >= NO_CLIP:
            object.__setattr__(self, "clip_qkv", None)


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
        _set_types(self, "ffn_config")
        if self.ffn_act_fn is None:
            object.__setattr__(self, "ffn_act_fn", {"name": "silu"})
        _positive(self, "ffn_config", "ffn_hidden_size", "moe_num_experts", "moe_top_k")
        if self.moe_top_k > self.moe_num_experts:
            raise ModelError(
                f"config: ffn_config.moe_top_k is {self.moe_top_k}, but there are {self.moe_num_experts} experts"
            )
        if self.activation not in ACTIVATIONS:
            raise ModelError(
                f"config: ffn_config.ffn_act_fn {shown(repr(self.ffn_act_fn))} is not supported",
                f"it must name one of {', '.join(ACTIVATIONS)}, and nothing else",
            )

    @property
    def activation(self) -> str | None:
        """The activation's name; None where more is said of it, since programs differ in what they make of that."""
        if not isinstance(self.ffn_act_fn, dict) or self.ffn_act_fn.keys() - {"name"}:
            return None
        name = self.ffn_act_fn.get("name", "silu")
        return name if isinstance(name, str) else None


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
                object.__setattr__(self, name, kind(**_inner(kind, name, value)))
        _set_types(self, "")
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

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise absent("DbrxConfig", name)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None, **changes: Any
    ) -> DbrxConfig:
        """Read the configuration of a folder, a file (config.json or GGUF) or a Hub id; `changes` replace values of it.

        A dict for `attn_config` or `ffn_config` replaces what it names. `ModelError` if there is none that can be used.
        """
        from .hub import resolve

        changes = own_names(changes)
        unknown = sorted(changes.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise TypeError(f"DbrxConfig has no value {listed(unknown)} to change")
        source = Path(name_or_path)
        if not (source.suffix == ".json" and source.is_file()):
            source = resolve(name_or_path, revision=revision, token=token, patterns=["config.json"])
        if source.is_dir():
            source = source / "config.json"
        if source.suffix == ".json":
            config = cls.from_json(source)
        else:
            from .formats.gguf_file import open_gguf

            config = cls.from_gguf(open_gguf(source))
        for name in {"attn_config", "ffn_config"} & changes.keys():
            part, change = getattr(config, name), changes[name]
            if not isinstance(change, type(part)):
                changes[name] = replace(part, **_inner(type(part), name, change))
        return replace(config, **changes)

    @classmethod
    def from_gguf(cls, file: GgufFile) -> DbrxConfig:
        """Read the header of a GGUF file; `ModelError` names the file where DBRX has no such network."""
        from .formats.gguf_metadata import check_head_dim, config_values

        values = config_values(file)
        parts = {"attn_config": DbrxAttentionConfig, "ffn_config": DbrxFFNConfig}
        try:
            config = cls(**values | {name: part(**values[name]) for name, part in parts.items()})
        except ModelError as error:
            raise file.fault(error.message, error.hint) from None
        check_head_dim(file, config.head_dim)
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DbrxConfig:
        """Read a parsed config.json.

        An unknown key inside `attn_config` or `ffn_config` is a `ModelError` (it would change the network), an
        unknown one at the top level a warning (fine-tunes add such keys).
        """
        return cls._read(values, "config")

    @classmethod
    def _read(cls, values: dict[str, Any], where: str) -> DbrxConfig:
        """See `from_dict`; warnings begin with `where`."""
        if not isinstance(values, dict):
            raise ModelError(f"config: must be an object, not {type(values).__name__}")
        values = own_names(values)
        kind = values.get("model_type", "dbrx")
        if kind not in KINDS:
            raise ModelError(f"config: model_type is {shown(repr(kind))}, not 'dbrx'", "choose a DBRX checkpoint")
        for name in ("attn_config", "ffn_config"):
            _require_object(name, values.get(name))
        require_untransposed(values)
        refuse_changing("", values)
        known = {f.name for f in fields(cls)}
        dropped = sorted(set(values) - known - IGNORED_AT_TOP)
        if dropped:
            plural = "s" * (len(dropped) > 1)
            warnings.warn(f"{where}: ignoring unknown key{plural} {listed(dropped)}", stacklevel=3)
        attn = {k: v for k, v in (values.get("attn_config") or {}).items() if k not in ROPE_OBJECTS}
        attn["rope_theta"] = rope_base(values, where)
        return cls(**{k: v for k, v in values.items() if k in known} | {"attn_config": attn})

    @classmethod
    def from_json(cls, path: str | Path, values: dict[str, Any] | None = None) -> DbrxConfig:
        """Read a config.json, or its parsed `values`; `ModelError` names the file when it cannot be used."""
        path = Path(path)
        if values is None and not os.path.lexists(path):
            raise ModelError(
                f"no config.json in {path.parent}", "give the folder of a checkpoint, a Hub id (org/name), or `demo`"
            )
        values = read_json(path) if values is None else values
        try:
            config = cls._read(values, str(path))
        except ModelError as error:
            raise ModelError(f"{path}: {error.message}", error.hint) from None
        if not rope_bases(values):
            warnings.warn(f"{path}: says no rope_theta; {DEFAULT_BASE:g} is taken, the default", stacklevel=2)
        return config

    from_json_file = from_json  # as transformers calls it

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that any DBRX program reads.

        transformers 5 takes no whole number for a float, nor the rotary base from attn_config; it and MLX fail at a
        `clip_qkv` of null.
        """
        values = asdict(self)
        values["attn_config"]["clip_qkv"] = values["attn_config"]["clip_qkv"] or NO_CLIP
        rope = {"rope_type": "default", "rope_theta": values["attn_config"]["rope_theta"]}
        return {"architectures": ["DbrxForCausalLM"], "model_type": "dbrx", **values, "rope_parameters": rope}

    def to_json_string(self) -> str:
        """The text of a config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_json_file(self, path: str | Path) -> None:
        """Write the text to `path`."""
        Path(path).write_text(self.to_json_string(), "utf-8")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder/config.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(folder) / "config.json")


def _positive(config: Any, scope: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value < MOST.get(name, LIMIT):
            raise ModelError(f"config: {f'{scope}.' if scope else ''}{name} must be above 0 and sane, not {value:.6g}")


def _require_object(name: str, value: Any) -> None:
    if not isinstance(value, dict | None):
        raise ModelError(f"config: {name} must be an object, not {type(value).__name__}")


def _inner(kind: type[Any], name: str, values: Any) -> dict[str, Any]:
    """The fields of `kind` that a parsed `attn_config` or `ffn_config` names."""
    _require_object(name, values)
    values = values or {}
    refuse_changing(f"{name}.", values)
    known = [f.name for f in fields(kind)]
    unknown = [key for key in values if key not in known and key not in IGNORED_INSIDE]
    if unknown:
        raise ModelError(f"config: unknown key {shown(repr(unknown[0]))} in {name}", f"known keys: {', '.join(known)}")
    given = {key: value for key, value in values.items() if key in known and key != "rope_theta"}
    if name == "attn_config" and rope_bases({name: values}):
        given["rope_theta"] = rope_base({name: values}, "config")
    return given


def _set_types(config: Any, scope: str) -> None:
    """Numbers where numbers belong, so that a wrong config fails here and not deep inside the network.

    null stands for the default where the network does not depend on it.
    """
    for f in fields(config):
        if f.default is MISSING:
            continue
        value, optional = getattr(config, f.name), "None" in str(f.type)
        whole, truth = f.type == "int", f.type == "bool"
        if value is None and not whole:
            object.__setattr__(config, f.name, None if optional else f.default)
            continue
        if value == {"__float__": "Infinity"}:  # as transformers 5 writes it
            value = math.inf
        if not (isinstance(value, bool) if truth else _is_number(value, whole, infinite=optional)):
            name = f"{scope}.{f.name}" if scope else f.name
            raise ModelError(f"config: {name} must be {f.type}, not {shown(repr(value))}")
        object.__setattr__(config, f.name, value if truth else int(value) if whole else float(value))


def _is_number(value: Any, whole: bool, infinite: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not abs(value) < 1e300:  # not a number, or no float could hold it
        return infinite and value == math.inf
    return not whole or isinstance(value, int) or value.is_integer()


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
