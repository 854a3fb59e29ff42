"""LoRA adapters: the logits of weights to which the change was added by hand, and those of peft; others are refused.

What peft computed is in tests/data (tests/reference/make_adapter_golden.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import DbrxForCausalLM
from model.adapter_config import FOLLOWED, PLAIN, WITHOUT_EFFECT, LoraConfig
from model.adapters import LoraLinear, attach, read_adapter
from model.config import DbrxConfig
from model.errors import ModelError
from model.formats import open_weights
from model.formats.write_quantized import Writer
from tests import make_adapter_table
from tests.cli import Cli
from tests.conftest import TINY
from tests.gguf_files import write_gguf
from tests.weights import adapter_weights, make_checkpoint, write_small_tokenizer

torch.set_num_threads(1)

IDS = torch.tensor([[5, 17, 2, 3, 90, 42, 9]])
BLOCK = "transformer.blocks.{}."
ATTENTION, ROUTER = "norm_attn_norm.attn.", "ffn.router.layer"
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "modules_to_save": None}
SMALL: dict[str, Any] = {**TINY, "vocab_size": 96}
Q, KV = 48, 8  # outputs of TINY's queries, and of its keys and values
ROWS = {"Wqkv": Q + 2 * KV, "q_proj": Q, "k_proj": KV, "v_proj": KV, "out_proj": 48, ROUTER: 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "m", SMALL, 7)


def pairs(
    modules: tuple[str, ...], rank: int = 4, seed: int = 0, layers: tuple[int, ...] = (0, 2)
) -> dict[str, Tensor]:
    """lora_A and lora_B of modules, as large as the weights themselves, by peft's names."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for layer in layers:
        for module in modules:
            name = f"base_model.model.{BLOCK.format(layer)}{'' if module == ROUTER else ATTENTION}{module}"
            found[f"{name}.lora_A.weight"] = torch.randn(rank, 48, generator=rng) / 7
            found[f"{name}.lora_B.weight"] = torch.randn(ROWS[module], rank, generator=rng) / 4
    return found


def write(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def dense(base: Path, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The whole weights with the change, worked out row by row from the definition, in float64."""
    state = {name: tensor.clone() for name, tensor in DbrxForCausalLM.from_pretrained(base).state_dict().items()}
    starts = {"q_proj": 0, "k_proj": Q, "v_proj": Q + KV}
    for name, b in tensors.items():
        if "lora_B" not in name:
            continue
        a = tensors[name.replace("lora_B", "lora_A")]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        stem, _, leaf = module.rpartition(".")
        weight = state[f"{stem}.Wqkv.weight" if leaf in starts else f"{module}.weight"]
        for row in range(len(b)):
            change = torch.stack([b[row, r].double() * a[r].double() for r in range(len(a))]).sum(0)
            weight[starts.get(leaf, 0) + row] += (scale * change).float()
    return state


@torch.no_grad()
def logits(network: DbrxForCausalLM) -> Tensor:
    return torch.as_tensor(network(IDS).logits).float()


def by_hand(base: Path, tensors: dict[str, Tensor], scale: float) -> Tensor:
    network = DbrxForCausalLM(DbrxConfig.from_dict(SMALL)).eval()
    network.load_state_dict(dense(base, tensors, scale))
    return logits(network)


@pytest.mark.parametrize("modules", [("Wqkv", "out_proj", ROUTER), ("q_proj", "v_proj"), ("k_proj", ROUTER)])
def test_merged_it_gives_the_logits_of_the_sum(base: Path, tmp_path: Path, modules: tuple[str, ...]) -> None:
    tensors = pairs(modules)
    network = DbrxForCausalLM.from_pretrained(base, adapter=write(tmp_path / "a", tensors))
    expected = by_hand(base, tensors, 2.0)
    assert (expected - logits(DbrxForCausalLM.from_pretrained(base))).abs().max() > 0.5  # it matters
    torch.testing.assert_close(logits(network), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("settings", "rank", "scale"),
    [
        ({"lora_alpha": 3}, 4, 0.75),
        ({"use_rslora": True}, 4, 4.0),
        ({"use_rslora": True, "lora_alpha": 3, "r": 2}, 2, 3 / math.sqrt(2)),
        ({"rank_pattern": {"Wqkv": 8}}, 8, 1.0),
        ({"alpha_pattern": {"attn.Wqkv": 2}}, 4, 0.5),
        ({"alpha_pattern": {"out_proj": 2}}, 4, 2.0),
    ],
)
def test_scales(base: Path, tmp_path: Path, settings: dict[str, Any], rank: int, scale: float) -> None:
    tensors = pairs(("Wqkv",), rank)
    network = DbrxForCausalLM.from_pretrained(base, adapter=write(tmp_path / "a", tensors, **settings))
    for name, expected in dense(base, tensors, scale).items():
        torch.testing.assert_close(network.state_dict()[name], expected, rtol=0, atol=1e-5)


DATA = Path(__file__).parent / "data"
GOLDEN: dict[str, Any] = json.loads((DATA / "adapter_golden.json").read_text())


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json of a case, as peft saved it."""
    found = {**GOLDEN["defaults"], **case["settings"]}
    return {key: value for key, value in found.items() if key not in case["without"]}


@pytest.fixture(scope="module")
def network(base: Path) -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(base)


@pytest.fixture(scope="module")
def peft_logits(network: DbrxForCausalLM) -> dict[str, Tensor]:
    """By case; those of the base agree, so that differences are the adapters'."""
    found = load_file(DATA / "adapter_golden.safetensors")
    torch.testing.assert_close(logits(network)[0], found["base"], rtol=0, atol=2e-4)
    return found


@pytest.mark.parametrize("name", GOLDEN["understood"])
@torch.no_grad()
def test_it_gives_the_logits_of_peft(
    network: DbrxForCausalLM, peft_logits: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    """Every option that is understood: which modules, rank, scale, and which of several patterns counts."""
    case = GOLDEN["understood"][name]
    tensors = {key: torch.from_numpy(value) for key, value in adapter_weights(case["shapes"]).items()}
    changes = read_adapter(write(tmp_path / "a", tensors, **settings_of(case)), network.config)
    before = {weight: network.get_parameter(weight).clone() for weight in changes}
    for weight, several in changes.items():
        for change in several:
            change.add_to(network.get_parameter(weight))
    found = logits(network)[0]
    network.load_state_dict(before, strict=False)
    torch.testing.assert_close(found, peft_logits[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", GOLDEN["refused"])
def test_what_peft_computes_in_another_way_is_refused(tmp_path: Path, name: str) -> None:
    """With what peft saved; as plain LoRA its logits would be far off, as the reference measured."""
    case = GOLDEN["refused"][name]
    option = next(key for key in case["settings"] if key in PLAIN)
    folder = write(tmp_path / "a", pairs(("Wqkv",)), **settings_of(case))
    with pytest.raises(ModelError, match=f"{option} is ") as error:
        read_adapter(folder, DbrxConfig.from_dict(TINY))
    assert case["plain_lora_is_off_by"] > 1 and error.value.hint
    # Where the way out is to merge with peft, peft's own reload and merge are right.
    assert ("merge it with peft" in error.value.hint) == (case.get("merged_is_off_by") == 0)


def test_every_option_is_decided_and_the_table_is_the_codes() -> None:
    assert not FOLLOWED.keys() & PLAIN.keys() and not WITHOUT_EFFECT.keys() & {*FOLLOWED, *PLAIN}
    assert set(GOLDEN["options"]) | {"merge_weights", "enable_lora"} == {*FOLLOWED, *PLAIN, *WITHOUT_EFFECT}
    assert make_adapter_table.FORMATS.read_text("utf-8") == make_adapter_table.page(), "run `make docs`"


@pytest.mark.reference
def test_every_option_of_the_newest_peft_is_decided() -> None:
    """Where peft is installed: a new release has new options."""
    peft = pytest.importorskip("peft")
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert options <= {*FOLLOWED, *PLAIN, *WITHOUT_EFFECT}


MODULES = [
    f"transformer.blocks.{layer}.{name}"
    for layer in (0, 1, 11)
    for name in ("norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj", "ffn.router.layer")
]
PATTERNS = [
    "Wqkv", "qkv", "attn.Wqkv", "layer", "router.layer", "out_proj", *MODULES[:5], "norm.attn_norm.attn.Wqkv",
    "^transformer.blocks.1.ffn.router.layer", "^attn.Wqkv", "Wqkv$", "$", "", r"blocks\.1\..*", r"blocks\.1.*",
    "Wqkv|layer", "(Wqkv|out_proj)", r".*\.[01]\..*(q|v|y|r)$", r"\d+\.ffn\..+", r"(?:\w+\.)*layer", "1.*", ".*",
    r"(?!.*router).*", "[^.]+", r"\w{4}", r"Wqk\w?", r"transformer\.blocks\.(?:1|11)\..+", "blocks.1",
]  # fmt: skip


def test_the_pattern_that_counts_is_that_of_pefts_rule(tmp_path: Path) -> None:
    """peft's get_pattern_key: the first key for which this expression matches."""
    path, rng = tmp_path / "adapter_config.json", random.Random(1)
    for drawn in [[pattern] for pattern in PATTERNS] + [rng.sample(PATTERNS, 3) for _ in range(40)]:
        alphas = {pattern: 9 + i for i, pattern in enumerate(drawn)}
        path.write_text(json.dumps({**SETTINGS, "r": 1, "alpha_pattern": alphas}))
        config = LoraConfig(path)
        for module in MODULES:
            first = next((key for key in drawn if re.match(rf"(.*\.)?({key})$", module)), None)
            assert config.scale(module, 1) == alphas.get(first, 8), (drawn, module)


def test_an_expression_that_takes_for_ever_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.adapter_config.MATCHING_S", 0.05)
    folder = write(tmp_path / "a", pairs(("Wqkv",)), alpha_pattern={r"(.|.)*" * 9 + "[xyz]": 2})
    with pytest.raises(ModelError, match="takes too long to match"):
        read_adapter(folder, DbrxConfig.from_dict(TINY))


def test_the_type_stays_that_of_the_weights(base: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in pairs(("Wqkv", ROUTER)).items()}
    folder = write(tmp_path / "a", tensors)
    network = DbrxForCausalLM.from_pretrained(base, adapter=folder, dtype="bfloat16")
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.bfloat16}
    expected = by_hand(base, {name: tensor.float() for name, tensor in tensors.items()}, 2.0)
    assert (logits(network) - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_base_stays_as_it_is(base: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in base.iterdir()}
    network = DbrxForCausalLM.from_pretrained(base, adapter=write(tmp_path / "a", pairs(("Wqkv",))))
    logits(network)
    assert {path: path.read_bytes() for path in base.iterdir()} == before


def test_over_a_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    rng = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 64, generator=rng), torch.randn(64, 2, generator=rng)
    name = "base_model.model.transformer.blocks.1.norm_attn_norm.attn.out_proj"
    folder = write(tmp_path / "a", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, r=2, lora_alpha=2)
    plain = DbrxForCausalLM.from_pretrained(path).state_dict()
    adapted = DbrxForCausalLM.from_pretrained(path, adapter=folder).state_dict()
    name = name.removeprefix("base_model.model.") + ".weight"
    torch.testing.assert_close(adapted[name], plain[name] + b @ a)
    assert all(torch.equal(adapted[other], plain[other]) for other in plain if other != name)


def test_beside_the_layers_it_gives_the_same(base: Path, tmp_path: Path) -> None:
    """As over weights that are stored quantized."""
    tensors = pairs(("q_proj", "v_proj", "out_proj", ROUTER))
    network = DbrxForCausalLM.from_pretrained(base)
    attach(network, read_adapter(write(tmp_path / "a", tensors), network.config))
    torch.testing.assert_close(logits(network), by_hand(base, tensors, 2.0), rtol=0, atol=2e-4)


def test_a_change_lies_where_its_layer_does(base: Path, tmp_path: Path) -> None:
    """Of layers over several GPUs; the first has the embedding."""
    network = DbrxForCausalLM.from_pretrained(base)
    network.device_map = {"": torch.device("cpu"), "transformer.blocks.2": torch.device("meta")}
    attach(network, read_adapter(write(tmp_path / "a", pairs(("q_proj", ROUTER))), network.config))
    beside = {name: module for name, module in network.named_modules() if isinstance(module, LoraLinear)}
    assert len({".blocks.2." in name for name in beside}) == 2
    for name, module in beside.items():
        assert module._changes[0].a.device.type == ("meta" if ".blocks.2." in name else "cpu")


def test_over_a_checkpoint_in_int8(base: Path, tmp_path: Path, cli: Cli) -> None:
    """Small changes, which would be lost if they were rounded to the base's own grid."""
    (tmp_path / "source").mkdir()
    for path in base.iterdir():
        shutil.copy(path, tmp_path / "source")
    write_small_tokenizer(tmp_path / "source")
    assert cli("convert", tmp_path / "source", tmp_path / "int8", "--to", "int8").code == 0
    tensors = {name: tensor / (3 if "lora_B" in name else 1) for name, tensor in pairs(("Wqkv", "out_proj")).items()}
    folder = write(tmp_path / "a", tensors)
    plain = logits(DbrxForCausalLM.from_pretrained(tmp_path / "int8"))
    adapted = logits(DbrxForCausalLM.from_pretrained(tmp_path / "int8", adapter=folder))
    expected = by_hand(base, tensors, 2.0) - logits(DbrxForCausalLM.from_pretrained(base))
    assert (adapted - plain - expected).abs().mean() < 0.25 * expected.abs().mean()


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_streamed_experts_see_the_adapter_too(base: Path, tmp_path: Path, form: str) -> None:
    """Merged over floats, beside stored bytes: the logits of resident experts with the same adapter."""
    source, options = base, {"dtype": form}
    if form == "int8":
        source, options = tmp_path / "int8", {}
        with open_weights(base) as weights:
            Writer(weights, source, "int8", 32).write(lambda _: None)
    folder = write(tmp_path / "a", pairs(("Wqkv", "out_proj", ROUTER), layers=(0, 1, 2)))
    plain = logits(DbrxForCausalLM.from_pretrained(source, **options))
    resident = logits(DbrxForCausalLM.from_pretrained(source, adapter=folder, **options))
    network = DbrxForCausalLM.from_pretrained(
        source, adapter=folder, offload="disk", expert_cache=12 * 6 * 4096, **options
    )
    streamed = logits(network)
    assert network.expert_store is not None and network.expert_store.counters.misses > network.expert_store.capacity
    assert (resident - plain).abs().max() > 0.5
    # Stored int8 computes with other roundings than packed int8; floats are the same to the bit.
    within = 0.05 * float(resident.abs().max()) if form == "int8" else 0
    torch.testing.assert_close(streamed, resident, rtol=0, atol=within)


def test_a_checksum_tells_adapters_apart(base: Path, tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", pairs(("Wqkv",))), write(tmp_path / "b", pairs(("Wqkv",)), lora_alpha=3)]
    found = [DbrxForCausalLM.from_pretrained(base, adapter=folder).adapter for folder in (None, *folders, folders[0])]
    assert found[0] == "none" and len(set(found)) == 3 and found[1] == found[3]


def changed(**settings: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder, pairs(("Wqkv",)), **settings)


def holding(**tensors: Tensor) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        names = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        write(folder, pairs(("Wqkv",)) | names)

    return make


def without(part: str) -> Callable[[Path], object]:
    return lambda folder: write(folder, {n: t for n, t in pairs(("Wqkv",)).items() if part not in n})


def cut(folder: Path) -> None:
    write(folder, pairs(("Wqkv",)))
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def pickled(folder: Path) -> None:
    write(folder, pairs(("Wqkv",)))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def of_rank(rank: int) -> Callable[[Path], object]:
    return lambda folder: write(folder, pairs(("Wqkv",), rank, layers=(0,)))


B1 = "base_model__model__transformer__blocks__1__"
DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_config": (lambda folder: folder.mkdir(), "holds no adapter_config.json"),
    "pickle": (pickled, "holds no adapter_model.safetensors"),
    "config_not_json": (
        lambda folder: (write(folder, pairs(("Wqkv",))) / "adapter_config.json").write_text("{"),
        "not valid JSON",
    ),
    "other_kind": (changed(peft_type="LOHA"), "peft_type is 'LOHA'"),
    "dora": (changed(use_dora=True), "use_dora is True"),
    "bias": (changed(bias="some"), "bias is 'some'"),
    "whole_modules": (changed(modules_to_save=["lm_head"]), "modules_to_save"),
    "alpha_text": (changed(lora_alpha="8"), "lora_alpha is '8', not a number"),
    "alpha_infinite": (changed(lora_alpha=1e999), "lora_alpha is inf"),
    "alpha_absent": (changed(lora_alpha=None), "lora_alpha is None"),
    "alpha_huge": (changed(lora_alpha=10**400), "lora_alpha is 1000"),
    "alpha_nan": (changed(lora_alpha=math.nan), "lora_alpha is nan, not a number"),
    "alpha_is_true": (changed(lora_alpha=True), "lora_alpha is True, not a number"),
    "rank_text": (changed(r="4"), "r is '4', not a whole number"),
    "rank_fraction": (changed(r=4.0), "r is 4.0, not a whole number"),
    "rank_of_another": (changed(r=8), "r is 8, but .* has matrices of rank 4"),
    "rank_absent": (changed(r=None), "r is None, not a whole number"),
    "rank_pattern_of_another": (changed(rank_pattern={"Wqkv": 8}), "rank_pattern is 8, but"),
    "rank_pattern_text": (changed(rank_pattern={"Wqkv": "4"}), r"rank_pattern\['Wqkv'\] is '4', not a whole number"),
    "patterns_listed": (changed(alpha_pattern=["Wqkv"]), r"alpha_pattern is \['Wqkv'\], not a table"),
    "rslora_text": (changed(use_rslora="true"), "use_rslora is 'true', not true or false"),
    "targets_number": (changed(target_modules=3), "target_modules is 3, not a list of names"),
    "layers_text": (changed(layers_to_transform="1"), "layers_to_transform is '1', not a list of whole numbers"),
    "pattern_broken": (changed(alpha_pattern={"(a": 2}), r"alpha_pattern holds '\(a', which is no expression"),
    "pattern_deep": (changed(alpha_pattern={"(?:" * 1000 + ")" * 1000: 2}), "which is no expression that is read here"),
    "pattern_fuzzy": (changed(alpha_pattern={"Wqku{e<=1}": 2}), "which is no expression that is read here"),
    "pattern_counted": (changed(alpha_pattern={"(((a?){99}){99}){99}": 2}), "which is no expression that is read here"),
    "pattern_with_flags": (changed(alpha_pattern={"(?i)wqkv": 2}), "which is no expression that is read here"),
    "not_targeted": (changed(target_modules=["out_proj"]), "changes .*Wqkv, which target_modules"),
    "excluded": (changed(exclude_modules="transformer.*"), "which target_modules, exclude_modules or"),
    "another_layer": (changed(target_modules=["Wqkv"], layers_to_transform=[1]), "blocks.0.*which target_modules"),
    "another_list": (
        changed(target_modules=["Wqkv"], layers_to_transform=[0, 2], layers_pattern="layers"), "which target_modules",
    ),
    "initialization": (changed(init_lora_weights="of_next_year"), "init_lora_weights is 'of_next_year'"),
    "variant_with_defaults": (changed(use_bdlora={}), "use_bdlora is {}"),
    "parts": (changed(enable_lora=[True, False, True]), "enable_lora is"),
    "option_of_next_year": (changed(use_xlora2=True), "use_xlora2 is True, and no option that is known here"),
    "nothing": (lambda folder: write(folder, {}), "holds no tensors"),
    "experts": (holding(**{f"{B1}ffn__experts__mlp__w1__lora_A__weight": torch.ones(2)}), "changes experts"),
    "head": (holding(base_model__model__lm_head__lora_A__weight=torch.ones(2)), "lm_head belongs to no matrix"),
    "head_beside_its_base": (
        holding(base_model__model__lm_head__base_layer__weight=torch.ones(2)), "lm_head belongs to no matrix",
    ),
    "embedding": (
        holding(base_model__model__transformer__wte__lora_embedding_A=torch.ones(2)), "transformer.wte belongs to no",
    ),
    "tokens": (
        holding(base_model__model__transformer__wte__token_adapter__trainable_tokens_delta=torch.ones(2)),
        "transformer.wte belongs to no matrix",
    ),
    "bias_of_b": (holding(**{f"{B1}norm_attn_norm__attn__Wqkv__lora_B__bias": torch.ones(2)}), "belongs to no matrix"),
    "norm": (holding(**{f"{B1}norm_attn_norm__norm_1__lora_A__weight": torch.ones(2)}), "belongs to no matrix"),
    "escapes": (holding(**{"\x1b[31m": torch.ones(2)}), r"\\x1b"),
    "layer_beyond": (
        holding(**{f"{B1.replace('1', '7')}norm_attn_norm__attn__Wqkv__lora_A__weight": torch.ones(4, 48)}),
        "no layer of this model",
    ),
    "only_a": (without("lora_B"), "only one of lora_A and lora_B"),
    "rank_zero": (of_rank(0), "do not fit"),
    "rank_huge": (of_rank(5000), "do not fit"),
    "another_size": (
        holding(**{f"{B1}norm_attn_norm__attn__out_proj__lora_{x}__weight": torch.ones(4, 4) for x in "AB"}),
        r"do not fit \[48, 48\]",
    ),
    "integers": (
        holding(**{f"{B1}norm_attn_norm__attn__out_proj__lora_A__weight": torch.ones(4, 48).int()}),
        "no float type",
    ),
    "not_finite": (
        holding(**{f"{B1}norm_attn_norm__attn__out_proj__lora_A__weight": torch.full((4, 48), math.nan)}),
        "out_proj.lora_A.weight holds numbers that are not finite",
    ),
    "truncated": (cut, "is truncated"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, defect: str) -> None:
    make, message = DEFECTS[defect]
    folder = tmp_path / "adapter"
    make(folder)
    with pytest.raises(ModelError, match=message) as error:
        read_adapter(folder, DbrxConfig.from_dict(TINY))
    assert error.value.message.startswith(str(folder)) and error.value.message.isprintable()


@pytest.mark.parametrize(("value", "loads"), [("Gaussian", True), ("MiCA", True), ("EVA", False), ("OLoRA", False)])
def test_initializations_are_read_in_the_letters_that_peft_reads(tmp_path: Path, value: str, loads: bool) -> None:
    """peft 0.21.2 compares these in lower case: gaussian, mica, olora; no others."""
    write(tmp_path, pairs(("Wqkv",)), init_lora_weights=value)
    if loads:
        LoraConfig(tmp_path / "adapter_config.json")
        return
    with pytest.raises(ModelError, match=f"init_lora_weights is '{value}'"):
        LoraConfig(tmp_path / "adapter_config.json")


def test_unknown_options_that_say_nothing_are_taken(tmp_path: Path) -> None:
    off = {"use_new": False, "new_config": None, "new_list": [], "new_table": {}, "new_text": ""}
    assert read_adapter(write(tmp_path / "a", pairs(("Wqkv",)), **off), DbrxConfig.from_dict(TINY))


def mlx(folder: Path) -> Path:
    """A folder that has the names of mlx_lm.lora."""
    folder.mkdir()
    lora = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    name = "transformer.blocks.0.norm_attn_norm.attn.Wqkv.lora_{}"
    save_file(
        {name.format("a"): torch.ones(48, 8), name.format("b"): torch.ones(8, 64)}, folder / "adapters.safetensors"
    )
    return folder


def llama_cpp(path: Path) -> Path:
    """A LoRA adapter as llama.cpp's convert_lora_to_gguf.py writes it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "dbrx")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    for letter, shape in (("a", (4, 64)), ("b", (128, 4))):
        writer.add_tensor(f"blk.0.attn_qkv.weight.lora_{letter}", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_other_adapters_are_named_with_their_way_in(base: Path, tmp_path: Path) -> None:
    """Given with --adapter; the first two given with -m, too."""
    of_mlx, of_llama_cpp = mlx(tmp_path / "mlx"), llama_cpp(tmp_path / "lora.gguf")
    several = tmp_path / "several"
    several.mkdir()
    inner = write(several / "checkpoint-5", pairs(("Wqkv",)))
    expected = {
        of_mlx: ("is an adapter of mlx-lm", f"mlx_lm.fuse --model BASE --adapter-path {of_mlx}"),
        of_llama_cpp: ("is a LoRA adapter of llama.cpp", "the one that this was converted from"),
        write_gguf(tmp_path / "m.gguf"): ("is a GGUF file, not an adapter", "as peft saves it"),
        base: ("is a whole model, not an adapter", "give it with -m"),
        several: ("holds no adapter_config.json", f"--adapter {inner}"),
        inner / "adapter_model.safetensors": ("is a file, not a folder", "takes the folder"),
        Path("~nobody-of-this-name/a"): ("holds no adapter_config.json", "as peft saves it"),
    }
    for path, (message, hint) in expected.items():
        with pytest.raises(ModelError, match=message) as error:
            read_adapter(path, DbrxConfig.from_dict(SMALL))
        assert hint in (error.value.hint or "") and error.value.message.startswith(str(path))
    for path, message in ((of_mlx, "is an adapter of mlx-lm"), (of_llama_cpp, "is a LoRA adapter of llama.cpp")):
        with pytest.raises(ModelError, match=message):
            DbrxForCausalLM.from_pretrained(path)


@pytest.mark.slow
def test_the_command_line(tiny_checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    folder = write(tmp_path / "a", pairs(("Wqkv", "out_proj", ROUTER), layers=(0, 1, 2)))
    plain, adapted = (
        cli("generate", "-m", tiny_checkpoint, "-n", "8", "-t", "0", "hello", *more)
        for more in ((), ("--adapter", folder))
    )
    assert plain.code == adapted.code == 0 and plain.out != adapted.out
    streamed = cli(
        "generate", "-m", tiny_checkpoint, "-n", "8", "-t", "0", "hello",
        "--adapter", folder, "--offload", "disk", "--expert-cache", "400KiB", "--dtype", "float32", "--json",
    )  # fmt: skip
    resident = cli(
        "generate", "-m", tiny_checkpoint, "-n", "8", "-t", "0", "hello", "--adapter", folder, "--dtype", "float32",
        "--json",
    )  # fmt: skip
    streamed_reply, reply = json.loads(streamed.out), json.loads(resident.out)
    assert streamed_reply["experts"]["misses"] and streamed_reply["token_ids"] == reply["token_ids"]
    ran = cli("generate", "-m", tiny_checkpoint, "--adapter", tmp_path / "gone", "hello")
    assert ran.code == 3 and "holds no adapter_config.json" in ran.fault
    ran = cli("generate", "-m", folder, "hello")
    assert ran.code == 3
