"""Make tests/data/adapter_golden.*: what peft computes with adapters of all options, on transformers 4.57.6.

    python -m venv ref
    ref/bin/pip install torch==2.13.0 transformers==4.57.6 peft==0.21.2 numpy safetensors
    ref/bin/python tests/reference/make_adapter_golden.py    # 20 seconds

Neither the base nor the adapters are stored: tests/weights.py makes both again. What an option does is what peft
computes after it has loaded the saved adapter again, since that is what a file means.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import BdLoraConfig, CordaConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DbrxConfig, DbrxForCausalLM

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from weights import adapter_weights, make_weights  # noqa: E402

CONFIG: dict[str, Any] = {
    "d_model": 48, "n_heads": 6, "n_layers": 3, "max_seq_len": 640, "vocab_size": 96,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 1, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 16, "moe_top_k": 4, "moe_jitter_eps": 0},
}  # fmt: skip
SEED = 7
IDS = torch.tensor([[5, 17, 2, 3, 90, 42, 9]])
ATTENTION = ["Wqkv", "out_proj"]
OUT_1 = "transformer.blocks.1.norm_attn_norm.attn.out_proj"

# Of each: options of LoraConfig. All are loaded as plain LoRA with the right ranks and scales.
UNDERSTOOD: dict[str, dict[str, Any]] = {
    "attention": {},
    "router": {"target_modules": ["Wqkv", "out_proj", "layer"], "lora_alpha": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"Wqkv": 2}, "alpha_pattern": {"out_proj": 5}},
    "patterns_and_rslora": {"use_rslora": True, "rank_pattern": {"Wqkv": 2}, "alpha_pattern": {"attn.Wqkv": 5}},
    "general_pattern_first": {"alpha_pattern": {"out_proj": 3, OUT_1: 32}},
    "full_name_first": {"alpha_pattern": {OUT_1: 32, "out_proj": 3}},
    "ranks_in_order": {"rank_pattern": {"attn.out_proj": 2, OUT_1: 6, "qkv": 8}},
    "pattern_anchored": {"alpha_pattern": {f"^{OUT_1}": 32, r"^attn\.Wqkv": 5}},
    "pattern_expression": {"alpha_pattern": {r".*\.[02]\..*(Wqkv|out_proj)": 3, r"W\w+": 32}},
    "pattern_dots": {"alpha_pattern": {"norm.attn_norm.attn.Wqkv": 3}},
    "all_linear": {"target_modules": "all-linear"},
    "target_expression": {"target_modules": r".*\.(?:Wqkv|layer)"},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "blocks"},
    "one_layer": {"layers_to_transform": 1},
    "excluded": {"exclude_modules": ["out_proj"]},
    "excluded_expression": {"exclude_modules": r".*blocks\.1.*"},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "transposed": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.5, "task_type": "CAUSAL_LM", "revision": "main"},
    "tied": {"ensure_weight_tying": True},
    "empty": {"modules_to_save": [], "alora_invocation_tokens": [], "target_parameters": [], "layer_replication": []},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "none": {"init_lora_weights": False},
    "velora": {"velora_config": VeloraConfig(num_groups=4)},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "loftq_unused": {"loftq_config": {"loftq_bits": 4}},
}
# Of each: options with which plain LoRA is wrong; the distance is stored.
REFUSED: dict[str, dict[str, Any]] = {
    **{kind: {"init_lora_weights": kind} for kind in ("pissa", "pissa_niter_4", "olora")},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "whole_modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 17, 3]},
    "activated": {"alora_invocation_tokens": [3, 90], "task_type": "CAUSAL_LM"},
    "kasa": {"kasa_config": KasaConfig()},
    "blocks": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["out_proj"], target_modules_bd_b=["Wqkv"], nblocks=2)},
}


def base() -> DbrxForCausalLM:
    network = DbrxForCausalLM(DbrxConfig(**copy.deepcopy(CONFIG), attn_implementation="eager")).eval()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in make_weights(CONFIG, SEED).items()})
    return network


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    return network.eval()(IDS).logits[0].float()


def options(**changed: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **changed})


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def drawn_anew(folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """A case: a saved adapter gets the weights of tests/weights.py, and what was chosen as it was chosen."""
    shapes = {name: list(tensor.shape) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    weights = {name: torch.from_numpy(value) for name, value in adapter_weights(shapes).items()}
    save_file(weights, folder / "adapter_model.safetensors")
    # peft sorts tables, and leaves out what it ignores.
    written = settings(folder) | {k: value for k, value in chosen.items() if not dataclasses.is_dataclass(value)}
    for key, value in written.items():
        if isinstance(value, list) and key.endswith("_modules"):
            value.sort()  # sets, in any order
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return {"settings": written, "shapes": shapes}


def shortened(cases: dict[str, dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Leave of each adapter_config.json what is not as in another one."""
    for case in cases.values():
        found = case["settings"]
        assert found.keys() <= defaults.keys()
        case["settings"] = {key: value for key, value in found.items() if value != defaults[key]}
        case["without"] = sorted(defaults.keys() - found.keys())


def train(network: PeftModel) -> None:
    """Move what a training could move."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, weight in network.named_parameters():
            if weight.requires_grad:
                weight += torch.randn(weight.shape, generator=rng) / 5


def prepare(network: DbrxForCausalLM, config: LoraConfig) -> None:
    """What two initializations want to know about the data."""
    rng = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, CONFIG["vocab_size"], (1, 60), generator=rng) for _ in range(30)]
    if config.init_lora_weights == "corda":
        preprocess_corda(network, config, run_model=lambda: [network(text) for text in texts])
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(network, config, lambda: network(texts[0], labels=texts[0]).loss.backward())


def plain(folder: Path) -> Tensor:
    """The logits of the base with scale * B @ A of the tensors that have the names of plain LoRA."""
    network, tensors = base(), load_file(folder / "adapter_model.safetensors")
    state = network.state_dict()
    for name, b in tensors.items():
        if not name.endswith(".lora_B.weight"):
            continue
        weight, a = (
            state.get(name.removeprefix("base_model.model.").replace(".lora_B", "")),
            tensors[name.replace("lora_B", "lora_A")],
        )
        if weight is not None and b.shape[1] == len(a) and weight.shape == (len(b), a.shape[1]):
            weight += 2 * b @ a
    network.load_state_dict(state)
    return logits(network)


def eva() -> tuple[PeftModel, dict[str, Any]]:
    """Trained as peft's documentation of EVA says: ranks follow the data."""
    chosen = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)}
    network = get_peft_model(base(), options(**chosen))
    rng = torch.Generator().manual_seed(5)
    shape = (4, 60)
    data = [
        {
            "input_ids": torch.randint(0, CONFIG["vocab_size"], shape, generator=rng),
            "attention_mask": torch.ones(shape).long(),
        }
        for _ in range(10)
    ]
    initialize_lora_eva_weights(network, data, show_progress_bar=False)
    return network, {}


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], tuple[PeftModel, dict[str, Any]]]] = {
        name: lambda chosen=chosen: (get_peft_model(base(), options(**chosen)), chosen)
        for name, chosen in UNDERSTOOD.items()
    }
    cases, tensors, refused = {}, {"base": logits(base())}, {}
    for name, make in {**makers, "eva": eva}.items():
        with tempfile.TemporaryDirectory() as folder:
            network, chosen = make()
            network.save_pretrained(folder)
            cases[name] = drawn_anew(Path(folder), chosen)
            tensors[name] = logits(PeftModel.from_pretrained(base(), folder))
        distance = (tensors[name] - tensors["base"]).abs().max()
        assert distance > 1, f"{name} changes little: {distance}"
    for name, chosen in REFUSED.items():
        with tempfile.TemporaryDirectory() as text:
            folder, initial = Path(text) / "trained", Path(text) / "initial"
            network, config = base(), options(**chosen)
            torch.manual_seed(11)
            prepare(network, config)
            network = get_peft_model(network, config)
            network.save_pretrained(initial)
            train(network)
            network.save_pretrained(folder)
            distance = (plain(folder) - logits(network)).abs().max().item()
            torch.manual_seed(12)
            refused[name] = {"settings": settings(folder), "plain_lora_is_off_by": round(distance, 3)}
            assert distance > 1, f"{name} is plain LoRA: {distance}"
            try:
                again = PeftModel.from_pretrained(base(), folder)
                refused[name]["reload_is_off_by"] = round((logits(again) - logits(network)).abs().max().item(), 3)
                refused[name]["merged_is_off_by"] = round(
                    (logits(again.merge_and_unload()) - logits(network)).abs().max().item(), 3
                )
            except (ValueError, RuntimeError, NotImplementedError) as error:
                refused[name]["fails"] = str(error)[:80]
            if "init_lora_weights" in chosen:
                converted = Path(text) / "converted"
                network.save_pretrained(converted, path_initial_model_for_weight_conversion=str(initial))
                assert (plain(converted) - logits(network)).abs().max() < 1e-3, f"{name} converted is no plain LoRA"
                cases[f"{name}_converted"] = drawn_anew(converted, {})
                tensors[f"{name}_converted"] = logits(PeftModel.from_pretrained(base(), converted))
    defaults = cases["attention"]["settings"]
    shortened(cases, defaults)
    shortened(refused, defaults)
    content = {
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "config": CONFIG,
        "seed": SEED,
        "input_ids": IDS[0].tolist(),
        "options": sorted(field.name for field in dataclasses.fields(LoraConfig)),
        "defaults": defaults,
        "understood": cases,
        "refused": refused,
    }
    (TESTS / "data" / "adapter_golden.json").write_text(json.dumps(content, indent=1) + "\n")
    save_file(tensors, TESTS / "data" / "adapter_golden.safetensors")


if __name__ == "__main__":
    main()
