"""DbrxConfig: Databricks' own file, what must be refused, and the network that the real dimensions give."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from model import DbrxConfig, DbrxForCausalLM, DbrxModel
from model.checkpoint import expected_tensors
from model.config import DbrxAttentionConfig, DbrxFFNConfig
from model.errors import ModelError

DATA = Path(__file__).parent / "data"
# The keys and values of Databricks' config.json for DBRX Instruct.
REAL: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "auto_map": {"AutoConfig": "configuration_dbrx.DbrxConfig"},
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "model_type": "",
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "initializer_range": 0.02,
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.2",
    "use_cache": True,
    "vocab_size": 100352,
}  # fmt: skip


# What releases of transformers wrote of one configuration (tests/reference/make_config_golden.py).
WRITTEN = [
    (release, kind, values)
    for release, made in json.loads((DATA / "transformers_configs.json").read_text()).items()
    for kind, values in made.items()
]


def changed(**changes: Any) -> dict[str, Any]:
    """REAL with some values replaced; `attn__x` reaches into attn_config, `ffn__x` into ffn_config."""
    values = copy.deepcopy(REAL)
    for key, value in changes.items():
        scope, _, inner = key.partition("__")
        if inner:
            values[f"{scope}_config"][inner] = value
        else:
            values[key] = value
    return values


def test_the_real_config_is_read() -> None:
    config = DbrxConfig.from_dict(REAL)
    assert (config.d_model, config.n_layers, config.n_heads, config.head_dim) == (6144, 40, 48, 128)
    assert (config.attn_config.kv_n_heads, config.attn_config.clip_qkv, config.attn_config.rope_theta) == (8, 8, 5e5)
    ffn = config.ffn_config
    assert (ffn.ffn_hidden_size, ffn.moe_num_experts, ffn.moe_top_k, ffn.moe_normalize_expert_weights) == (
        10752,
        16,
        4,
        1,
    )
    assert ffn.activation == "silu" and config.max_seq_len == 32768 and config.vocab_size == 100352


def test_the_real_network_has_every_parameter_and_no_other() -> None:
    config = DbrxConfig.from_dict(REAL)
    with torch.device("meta"):
        network = DbrxForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == 131_596_523_520
    assert shapes == expected_tensors(config)
    # The table of the model's own description.
    block, kv = "transformer.blocks.39.", 2 * 8 * 128
    assert {name.removeprefix(block): shape for name, shape in shapes.items() if name.startswith(block)} == {
        "norm_attn_norm.norm_1.weight": (6144,),
        "norm_attn_norm.norm_2.weight": (6144,),
        "norm_attn_norm.attn.Wqkv.weight": (6144 + kv, 6144),
        "norm_attn_norm.attn.out_proj.weight": (6144, 6144),
        "ffn.router.layer.weight": (16, 6144),
        "ffn.experts.mlp.w1": (16 * 10752, 6144),
        "ffn.experts.mlp.v1": (16 * 10752, 6144),
        "ffn.experts.mlp.w2": (16 * 10752, 6144),
    }
    assert shapes["transformer.wte.weight"] == shapes["lm_head.weight"] == (100352, 6144)
    assert shapes["transformer.norm_f.weight"] == (6144,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn__moe_capacity": 2}, "unknown key 'moe_capacity' in ffn_config"),
        ({"attn__window": 2}, "unknown key 'window' in attn_config"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"d_model": 6145}, "does not divide"),
        ({"n_heads": 0}, "n_heads must be above 0"),
        ({"n_layers": 10**12}, "n_layers must be above 0 and sane"),
        ({"d_model": "6144"}, "d_model must be int"),
        ({"d_model": 6144.5}, "d_model must be int"),
        ({"d_model": True}, "d_model must be int"),
        ({"use_cache": "yes"}, "use_cache must be bool"),
        ({"attn__kv_n_heads": 7}, "not a multiple"),
        ({"attn__clip_qkv": -1}, "clip_qkv"),
        ({"ffn__moe_top_k": 17}, "there are 16 experts"),
        ({"ffn__ffn_act_fn": {"name": "swish"}}, "is not supported"),
        ({"ffn__ffn_act_fn": "silu"}, "is not supported"),
        ({"ffn_config": [1]}, "ffn_config must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling 'linear' is not supported"),
        ({"attn__rope_parameters": {"rope_type": "yarn"}}, "rope_parameters 'yarn' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_parameters 'full_attention' is not"),
        (
            {"attn__rope_theta": None, "rope_parameters": {"rope_theta": "1e4"}},
            "rope_parameters.rope_theta must be a n",
        ),
        ({"attn__rope_theta": True}, "attn_config.rope_theta must be a number"),
        ({"attn__rope_theta": 1e-320}, "rope_theta must be from 1 to"),
        ({"attn__rope_theta": float("nan")}, "rope_theta must be"),
        ({"n_layers": float("nan")}, "n_layers must be int"),
        ({"d_model": float("inf")}, "d_model must be int"),
        ({"d_model": 10**400}, "d_model must be"),
        ({"attn__rope_theta": 10**400}, "rope_theta must be"),
        ({"attn__rope_theta": 10**31}, "rope_theta must be from 1 to"),
        ({"attn_config": "x"}, "attn_config must be an object, not str"),
        ({"attn_config": 5}, "attn_config must be an object, not int"),
        ({"ffn__uniform_expert_assignment": True}, "ffn_config.uniform_expert_assignment True is not supported"),
        ({"per_layer_config": {"0": {"n_heads": 4}}}, "per_layer_config .* is not supported"),
        ({"attn__pruned_heads": {"1": [0]}}, "attn_config.pruned_heads .* is not supported"),
        ({"ffn__ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}, "is not supported"),
        ({"ffn__ffn_act_fn": {"name": "x" * 10**6}}, r"characters\) is not supported"),
        ({"attn__" + "y" * 10**6: 1}, r"characters\) in attn_config"),
    ],
)
def test_what_would_compute_something_else_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(**changes)))
    with pytest.raises(ModelError, match=message) as caught:
        DbrxConfig.from_json(tmp_path / "config.json")
    assert str(tmp_path) in caught.value.message and "\n" not in caught.value.one_line


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "\udcff", "[" * 100_000], ids=["empty", "open", "list", "bytes", "deep"]
)
def test_a_file_that_is_no_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json"):
        DbrxConfig.from_json(tmp_path / "config.json")


def test_a_config_that_is_no_file_of_the_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match="is not a regular file"):
        DbrxConfig.from_json(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="links to a place outside"):
        DbrxConfig.from_json(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelError, match="more than any such file needs"):
        DbrxConfig.from_json(tmp_path / "config.json")


def test_no_config_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        DbrxConfig.from_json(tmp_path / "config.json")
    assert caught.value.hint and "demo" in caught.value.hint


@pytest.mark.parametrize(("release", "kind", "values"), WRITTEN, ids=[f"{r}-{k}" for r, k, _ in WRITTEN])
@pytest.mark.filterwarnings("ignore:.*the former counts")
def test_what_transformers_writes_is_read(release: str, kind: str, values: dict[str, Any]) -> None:
    expected = DbrxConfig(
        d_model=96,
        n_heads=6,
        n_layers=2,
        max_seq_len=512,
        vocab_size=320,
        attn_config=DbrxAttentionConfig(clip_qkv=8, kv_n_heads=2, rope_theta=500000),
        ffn_config=DbrxFFNConfig(ffn_hidden_size=40, moe_num_experts=4, moe_top_k=2),
    )
    assert DbrxConfig.from_dict(values) == expected


ROPE_500000 = {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"rope_parameters": ROPE_500000}, 500000),
        ({"rope_scaling": {"type": "default", "rope_theta": 500000}}, 500000),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 500000}}, 500000),
        ({"attn__rope_parameters": ROPE_500000}, 500000),
        ({"attn__rope_scaling": {"rope_type": "default", "rope_theta": 7e6}}, 7e6),
        ({"rope_theta": 500000}, 500000),
        ({"attn__rope_theta": None, "rope_theta": 2804339835.0}, 2804339835),  # of a Llama with a context of 1 M
        ({"attn__rope_theta": 500000, "rope_parameters": ROPE_500000, "rope_theta": 500000.0}, 500000),
    ],
)
def test_the_rotary_base_is_found_wherever_a_release_puts_it(changes: dict[str, Any], base: float) -> None:
    values = changed()
    del values["attn_config"]["rope_theta"]
    for key, value in changes.items():
        scope, _, inner = key.partition("__")
        values.get(f"{scope}_config", values)[inner or key] = value
    assert DbrxConfig.from_dict(values).attn_config.rope_theta == base


@pytest.mark.parametrize(
    ("changes", "base", "message"),
    [
        (
            {"rope_parameters": {"rope_theta": 1e4}},
            5e5,
            "attn_config.rope_theta is 500000 and rope_parameters.rope_theta",
        ),
        (
            {"rope_theta": 7, "attn__rope_parameters": {"rope_theta": 7}},
            5e5,
            "attn_config.rope_parameters.rope_theta 7;",
        ),
        ({"attn__rope_theta": None}, 1e4, "says no rope_theta; 10000 is taken"),
        ({"attn_config": None}, 1e4, "says no rope_theta"),
        ({f"key{i}": 1 for i in range(2000)}, 5e5, r"unknown keys key0, key1, .* and 1992 more$"),
        ({"x" * 10**6: 1}, 5e5, r"unknown key x{100}\.\.\. \(1000000 characters\)$"),
    ],
)
def test_what_is_told_is_told_once_and_short(
    changes: dict[str, Any], base: float, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(**changes)))
    with pytest.warns(UserWarning, match=message) as told:
        config = DbrxConfig.from_json(tmp_path / "config.json")
    assert len(told) == 1 and len(str(told[0].message)) < 300
    assert config.attn_config.rope_theta == base


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "dbrx_converted"},
        {"ffn__uniform_expert_assignment": False},
        {"ffn__moe_normalize_expert_weights": 1},
        {"ffn__moe_normalize_expert_weights": None, "ffn__moe_loss_weight": 0},
        {"attn__pruned_heads": {}, "attn__tie_word_embeddings": True, "attn__top_k": 50},
        {"per_layer_config": None, "output_router_logits": None, "resid_pdrop": None},
        {"d_model": 6144.0, "n_heads": 48.0},
        {"transformers_version": "5.3.0", "ffn__hidden_size": 6144},  # only saved there: the widths differ
        {"transformers_version": "5.15.0", "ffn__ffn_hidden_size": 6144, "ffn__hidden_size": 6144},
        {"transformers_version": "4.57.6", "ffn__ffn_hidden_size": 6144, "ffn__hidden_size": 6144},
    ],
)
def test_what_says_nothing_of_the_network_is_accepted(changes: dict[str, Any]) -> None:
    config = DbrxConfig.from_dict(changed(**changes))
    assert (config.d_model, config.attn_config.rope_theta, config.resid_pdrop) == (6144, 500000, 0)


@pytest.mark.parametrize("release", ["5.0.0", "5.0.0.dev0", "5.0.0rc1", "5.9.0", "5.14.0", "5.14.2"])
def test_experts_that_lie_transposed_are_refused_though_their_shapes_are_right(release: str) -> None:
    values = changed(transformers_version=release, ffn__ffn_hidden_size=6144, ffn__hidden_size=6144)
    with pytest.raises(ModelError, match="experts' matrices transposed") as caught:
        DbrxConfig.from_dict(values)
    assert caught.value.hint and "the release that made it" in caught.value.hint


def test_a_clip_that_clips_nothing_is_none() -> None:
    for clip in (65504, 65504.0, 3e38, {"__float__": "Infinity"}, math.inf):
        assert DbrxConfig.from_dict(changed(attn__clip_qkv=clip)).attn_config.clip_qkv is None
    assert DbrxConfig.from_dict(changed(attn__clip_qkv=65503.5)).attn_config.clip_qkv == 65503.5


def test_what_is_written_is_what_every_release_reads() -> None:
    """Floats as floats, the rotary base under both keys, no clip as a number that float16 holds."""
    values = DbrxConfig.from_dict(changed(attn__clip_qkv=None, ffn__moe_normalize_expert_weights=1)).to_dict()
    attn, ffn = values["attn_config"], values["ffn_config"]
    assert attn["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500000
    assert torch.ones(2, dtype=torch.float16).clamp(-attn["clip_qkv"], attn["clip_qkv"]).tolist() == [1, 1]
    for scope, keys in (
        (values, ("resid_pdrop", "emb_pdrop", "initializer_range", "router_aux_loss_coef")),
        (attn, ("attn_pdrop", "clip_qkv", "rope_theta")),
        (ffn, ("moe_jitter_eps", "moe_loss_weight", "moe_normalize_expert_weights")),
    ):
        assert all(type(scope[key]) is float for key in keys)
    assert attn.keys() == {"attn_pdrop", "clip_qkv", "kv_n_heads", "rope_theta"}  # 4.57.6 refuses any other


def test_unknown_keys_at_the_top_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="ignoring unknown key fine_tuned_by"):
        DbrxConfig.from_dict(changed(fine_tuned_by="someone"))


def test_a_second_rope_theta_is_warned_about_and_not_taken() -> None:
    values = changed(attn__rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with pytest.warns(UserWarning, match="the former counts"):
        assert DbrxConfig.from_dict(values).attn_config.rope_theta == 500000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(REAL))
    return tmp_path


def test_a_changed_part_keeps_what_it_does_not_name(folder: Path) -> None:
    """As transformers 5.24.0 merges them."""
    real = DbrxConfig.from_dict(REAL)
    config = DbrxConfig.from_pretrained(folder, attn_config={"clip_qkv": 4}, ffn_config={"moe_top_k": 1})
    assert config.attn_config == dataclasses.replace(real.attn_config, clip_qkv=4)
    assert config.ffn_config == dataclasses.replace(real.ffn_config, moe_top_k=1)
    assert DbrxConfig.from_pretrained(folder, attn_config=None, ffn_config={}) == real
    for change in ({"rope_parameters": {"rope_theta": 1e6}}, {"rope_theta": 10**6}):
        config = DbrxConfig.from_pretrained(folder, attn_config=change)
        assert config.attn_config == dataclasses.replace(real.attn_config, rope_theta=1e6)
    whole = DbrxAttentionConfig(kv_n_heads=4)
    assert DbrxConfig.from_pretrained(folder, attn_config=whole).attn_config == whole
    with pytest.raises(ModelError, match="unknown key 'clip' in attn_config"):
        DbrxConfig.from_pretrained(folder, attn_config={"clip": 4})


def test_the_constructor_reads_the_rotary_objects_too() -> None:
    assert DbrxConfig(attn_config={"rope_parameters": ROPE_500000}).attn_config.rope_theta == 500000  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="rope_scaling 'yarn' is not supported"):
        DbrxConfig(attn_config={"rope_scaling": {"rope_type": "yarn", "factor": 4}})  # type: ignore[arg-type]


def test_general_names_stand_for_our_own(folder: Path) -> None:
    names = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }
    renamed = {{ours: general for general, ours in names.items()}.get(key, key): REAL[key] for key in REAL}
    for values in (renamed, REAL | {"hidden_size": 32}):
        assert DbrxConfig.from_dict(values) == DbrxConfig.from_dict(REAL)
    assert DbrxConfig.from_pretrained(folder, hidden_size=96).d_model == 96
    with pytest.raises(TypeError, match="no value num_layers to change"):
        DbrxConfig.from_pretrained(folder, num_layers=2)


def test_a_large_base_is_a_float() -> None:
    base = DbrxConfig.from_dict(changed(attn__rope_theta=10**25)).attn_config.rope_theta
    assert type(base) is float and base == 1e25


def test_what_is_no_value_is_refused_by_the_constructor_too() -> None:
    with pytest.raises(ModelError, match="n_layers must be int, not '2'"):
        DbrxConfig(n_layers="2")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"attn_config\.kv_n_heads must be int"):
        DbrxAttentionConfig(kv_n_heads=None)  # type: ignore[arg-type]
    for values in ([], None, "x"):
        with pytest.raises(ModelError, match="must be an object"):
            DbrxConfig.from_dict(values)  # type: ignore[arg-type]


def test_the_file_itself_can_be_given(folder: Path) -> None:
    assert DbrxConfig.from_pretrained(folder / "config.json") == DbrxConfig.from_pretrained(folder)


def test_a_saved_config_is_the_same(tmp_path: Path) -> None:
    config = DbrxConfig.from_dict(changed(attn__clip_qkv=None, ffn__moe_normalize_expert_weights=None))
    config.save_pretrained(tmp_path)
    assert DbrxConfig.from_json(tmp_path / "config.json") == config


def test_the_documented_example() -> None:
    configuration = DbrxConfig(n_layers=2, d_model=256, n_heads=8, vocab_size=128)
    model = DbrxModel(configuration)
    assert model.config is configuration
    assert configuration.hidden_size == 256 and configuration.num_attention_heads == 8
    assert configuration.num_hidden_layers == 2 and configuration.max_position_embeddings == 2048
    out = model(torch.tensor([[1, 2, 3]]))
    assert out.last_hidden_state.shape == out[0].shape == (1, 3, 256)
    assert out.past_key_values is not None and out.past_key_values.get_seq_length() == 3
