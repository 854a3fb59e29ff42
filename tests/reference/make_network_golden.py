"""Make tests/data/network_*: what transformers 4.57.6 computes for small DBRX models.

transformers 4.57.6 agrees with Databricks' own modeling_dbrx.py; later releases do not (see README.md here).

    python -m venv ref
    ref/bin/pip install torch==2.13.0 transformers==4.57.6 numpy safetensors
    ref/bin/python tests/reference/make_network_golden.py

The weights are not stored: tests/weights.py makes them from a config and a seed. The seed of each model is the first
one without near-ties, so that no rounding of another correct program may choose another token or another expert.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import DbrxConfig, DbrxForCausalLM, DynamicCache

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from weights import fingerprint, make_weights  # noqa: E402

DATA = TESTS / "data"
REFERENCE = "4.57.6"

LENGTH = 331  # of the long sequence
PREFIX = 16  # positions whose attention weights are stored
BATCH_LENGTHS = (23, 17, 9)
PROMPT_LENGTH, NEW_TOKENS, STORED_STEPS = 12, 40, 5
PAD_ID = 0
# Logits and hidden states are stored at the start, at the end and at every ninth position between.
POSITIONS = sorted({*range(PREFIX), *range(0, LENGTH, 9), *range(LENGTH - PREFIX, LENGTH)})

MIN_TOKEN_MARGIN = 1e-3  # between the best two logits of every greedy step
MIN_EXPERT_MARGIN = 1e-4  # between the log-probabilities of the last chosen and the first unchosen expert
MIN_DISTINCT_TOKENS = 12  # of a greedy reply: a reply that repeats itself shows little


def config(heads: int, head_dim: int, kv: int, layers: int, vocab: int, ffn: dict[str, Any], **attn: Any) -> dict:
    """A config.json as a dictionary; what is not named here is at its default."""
    return {
        "d_model": heads * head_dim,
        "n_heads": heads,
        "n_layers": layers,
        "max_seq_len": 512,
        "vocab_size": vocab,
        "attn_config": {"kv_n_heads": kv, **attn},
        "ffn_config": ffn,
    }


def ffn(hidden: int, experts: int, top_k: int, **more: Any) -> dict[str, Any]:
    """An ffn_config."""
    return {"ffn_hidden_size": hidden, "moe_num_experts": experts, "moe_top_k": top_k, **more}


# Inside each config every dimension differs from every other one (but where the name says so), since equal ones hide
# a swapped axis: transformers 5.0 had the expert shapes swapped and passed its own tests.
CONFIGS = {
    "like_dbrx": config(
        12, 8, 2, 3, 211, ffn(40, 16, 4, moe_normalize_expert_weights=1.0, moe_loss_weight=0.05),
        clip_qkv=8, rope_theta=500000,
    ),
    "one_kv_head": config(
        5, 12, 1, 2, 173, ffn(44, 6, 3, moe_normalize_expert_weights=2.0), clip_qkv=None, rope_theta=10000
    ),
    "kv_equals_heads": config(
        4, 14, 4, 3, 127, ffn(72, 8, 2, moe_normalize_expert_weights=None), clip_qkv=2, rope_theta=10000
    ),
    "two_to_one": config(
        6, 10, 3, 4, 149, ffn(36, 7, 2, moe_normalize_expert_weights=1.0), clip_qkv=None, rope_theta=500000
    ),
    "top_one": config(
        6, 16, 2, 4, 181, ffn(28, 5, 1, moe_normalize_expert_weights=None), clip_qkv=3, rope_theta=500000
    ),
    "all_experts": config(
        8, 6, 2, 3, 139, ffn(52, 5, 5, moe_normalize_expert_weights=2.0), clip_qkv=None, rope_theta=10000
    ),
    "gelu": config(
        9, 8, 3, 2, 163, ffn(100, 10, 4, moe_normalize_expert_weights=1.0, ffn_act_fn={"name": "gelu"}),
        clip_qkv=6, rope_theta=500000,
    ),
    "deep": config(
        2, 20, 1, 7, 109, ffn(64, 12, 5, moe_normalize_expert_weights=1.0), clip_qkv=5, rope_theta=10000
    ),
}  # fmt: skip


def build(config: dict[str, Any], seed: int, attention: str = "eager") -> DbrxForCausalLM:
    """The reference's network with our weights; every name and shape must fit."""
    weights = make_weights(config, seed)
    config = copy.deepcopy(config)
    if attention == "eager" and config["attn_config"]["clip_qkv"] is None:
        # The reference's eager attention calls clamp(None, None), which raises. Clipping at infinity changes nothing.
        config["attn_config"]["clip_qkv"] = float("inf")
    model = DbrxForCausalLM._from_config(DbrxConfig(**config), attn_implementation=attention).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model


def to_bfloat16(model: DbrxForCausalLM) -> DbrxForCausalLM:
    """Cast parameters only, as loading does: `model.to(bfloat16)` would round the rotary frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def random_ids(config: dict[str, Any], seed: int, length: int) -> Tensor:
    """Token ids [length]; the padding id is among them, since a mask must decide what is padding."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, config["vocab_size"], length))


def padded_batch(config: dict[str, Any], seed: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [3, 23] of the same three sequences, padded on one side."""
    width = max(BATCH_LENGTHS)
    ids = torch.full((len(BATCH_LENGTHS), width), PAD_ID)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(BATCH_LENGTHS):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = random_ids(config, seed + 1 + row, length)
        mask[row, place] = 1
    return ids, mask


def with_ignored(ids: Tensor) -> Tensor:
    """Labels: the ids, but -100 at the first third (a prompt) and at every seventh place of the rest."""
    labels = ids.clone()
    labels[: len(ids) // 3] = -100
    labels[len(ids) // 3 + 2 :: 7] = -100
    return labels


def expert_margin(router_probs: Tensor, top_k: int) -> float:
    """Least difference of log-probabilities at the edge of the choice; infinite where every expert is chosen."""
    ordered = router_probs.log().sort(-1, descending=True).values
    return (ordered[..., top_k - 1] - ordered[..., top_k]).min().item() if top_k < ordered.shape[-1] else float("inf")


def stack_router(outputs: Any, batch: int) -> Tensor:
    """Router probabilities [layers, batch, seq, experts] (named logits there, but they are after the softmax)."""
    return torch.stack([layer.view(batch, -1, layer.shape[-1]) for layer in outputs.router_logits])


def make_single(model: DbrxForCausalLM, config: dict[str, Any], seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One long sequence: logits, last hidden state, router probabilities, attention weights, losses."""
    ids = random_ids(config, seed, LENGTH)
    labels = with_ignored(ids)
    out = model(
        ids[None], labels=labels[None], output_router_logits=True, output_hidden_states=True, output_attentions=True
    )
    prefix = model(ids[None, :PREFIX], output_attentions=True)
    tensors = {
        "input_ids": ids,
        "labels": labels,
        "positions": torch.tensor(POSITIONS),
        "logits": out.logits[0, POSITIONS],
        "last_hidden_state": out.hidden_states[-1][0, POSITIONS],
        "router_probs": stack_router(out, 1)[:, 0],
        "prefix_attentions": torch.stack(prefix.attentions)[:, 0],
    }
    cross_entropy = model(ids[None], labels=labels[None]).loss
    losses = {"cross_entropy": cross_entropy.item(), "auxiliary": out.aux_loss.item(), "total": out.loss.item()}
    full = torch.stack([a[0, :, -1].amax(-1).mean() for a in out.attentions])
    return tensors, {"loss_single": losses, "mean_of_largest_attention_at_last_position": full.mean().item()}


def make_batch(model: DbrxForCausalLM, config: dict[str, Any], seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Three sequences padded left (as for generation) and right (as for a loss)."""
    left, left_mask = padded_batch(config, seed, "left")
    right, right_mask = padded_batch(config, seed, "right")
    positions = (left_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(left, attention_mask=left_mask, position_ids=positions).logits[left_mask.bool()]
    labels = torch.full_like(right, -100)
    for row, length in enumerate(BATCH_LENGTHS):
        labels[row, :length] = with_ignored(right[row, :length])
    masked = model(right, attention_mask=right_mask, labels=labels, output_router_logits=True)
    unmasked = model(right, labels=labels, output_router_logits=True)
    tensors = {
        "batch_left_ids": left,
        "batch_left_mask": left_mask,
        "batch_left_positions": positions,
        "batch_right_ids": right,
        "batch_right_mask": right_mask,
        "batch_right_labels": labels,
        "batch_logits": logits,
    }
    cross_entropy = model(right, attention_mask=right_mask, labels=labels).loss.item()
    losses = {
        name: {"cross_entropy": cross_entropy, "auxiliary": out.aux_loss.item(), "total": out.loss.item()}
        for name, out in (("loss_batch_right_masked", masked), ("loss_batch_right_unmasked", unmasked))
    }
    # The two sides and a row alone must agree, or the reference itself would be in doubt.
    alone = torch.cat([model(right[row : row + 1, :length]).logits[0] for row, length in enumerate(BATCH_LENGTHS)])
    differences = {
        "left_padded_against_right_padded": max_abs(logits - masked.logits[right_mask.bool()]),
        "left_padded_against_each_row_alone": max_abs(logits - alone),
    }
    assert max(differences.values()) < 1e-4, differences
    margin = expert_margin(stack_router(masked, 3)[:, right_mask.bool()], config["ffn_config"]["moe_top_k"])
    return tensors, {**losses, "self_check_padding": differences, "expert_margin_of_batch": margin}


def make_greedy(model: DbrxForCausalLM, config: dict[str, Any], seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Greedy decoding by the reference's own `generate` and by a loop over its cache; both must agree."""
    prompt = random_ids(config, seed + 10, PROMPT_LENGTH)
    generated = model.generate(
        prompt[None], attention_mask=torch.ones(1, PROMPT_LENGTH, dtype=torch.long), do_sample=False,
        max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=PAD_ID,
    )[0, PROMPT_LENGTH:]  # fmt: skip
    cache, step, steps, ids = DynamicCache(), prompt[None], [], []
    for _ in range(NEW_TOKENS):
        steps.append(model(step, past_key_values=cache, use_cache=True).logits[0, -1])
        ids.append(int(steps[-1].argmax()))
        step = torch.tensor([ids[-1:]])
    assert ids == generated.tolist()
    cached = torch.stack(steps)
    full = model(torch.cat([prompt, generated])[None, :-1], output_router_logits=True)
    difference = max_abs(cached - full.logits[0, PROMPT_LENGTH - 1 :])
    assert difference < 1e-4, difference
    best = cached.topk(2, -1).values
    margins = best[:, 0] - best[:, 1]
    tensors = {
        "greedy_prompt": prompt,
        "greedy_ids": generated,
        "greedy_margins": margins,
        "greedy_last_logits": cached[-STORED_STEPS:],
    }
    return tensors, {
        "greedy_least_margin": margins.min().item(),
        "greedy_distinct_tokens": len(set(ids)),
        "self_check_cached_against_full": difference,
        "expert_margin_of_greedy": expert_margin(stack_router(full, 1), config["ffn_config"]["moe_top_k"]),
    }


def max_abs(x: Tensor) -> float:
    """Largest absolute value."""
    return x.abs().max().item()


def bfloat16_deviation(config: dict[str, Any], seed: int, ids: Tensor, float32: Any) -> dict[str, Any]:
    """How far the reference in bfloat16 is from itself in float32: our own bfloat16 may be as far."""
    result: dict[str, Any] = {}
    for attention in ("eager", "sdpa"):
        out = to_bfloat16(build(config, seed, attention))(ids[None], output_router_logits=True)
        error = (out.logits.float() - float32.logits).abs()
        top_k = config["ffn_config"]["moe_top_k"]
        chosen = [stack_router(o, 1).float().topk(top_k, -1).indices.sort(-1).values for o in (out, float32)]
        result[attention] = {
            "max_abs": error.max().item(),
            "mean_abs": error.mean().item(),
            "share_of_positions_with_the_same_top_token": (out.logits.argmax(-1) == float32.logits.argmax(-1))
            .float()
            .mean()
            .item(),
            "share_of_expert_choices_that_differ": (chosen[0] != chosen[1]).any(-1).float().mean().item(),
        }
    return result


def sensitivity(config: dict[str, Any], seed: int, ids: Tensor, logits: Tensor) -> dict[str, float]:
    """How far the logits move when one thing is got wrong: the data would catch it."""
    other = {
        "rope_theta": ("attn_config", "rope_theta", 510000 - config["attn_config"]["rope_theta"]),
        "clip_qkv": ("attn_config", "clip_qkv", None if config["attn_config"]["clip_qkv"] else 1),
        "moe_normalize_expert_weights": (
            "ffn_config",
            "moe_normalize_expert_weights",
            1 if config["ffn_config"]["moe_normalize_expert_weights"] != 1 else 2,
        ),
        "ffn_act_fn": ("ffn_config", "ffn_act_fn", {"name": "relu"}),
    }
    result = {}
    for name, (part, key, value) in other.items():
        wrong = copy.deepcopy(config)
        model = build(config, seed)
        wrong[part][key] = value
        changed = build(wrong, seed)
        changed.load_state_dict(model.state_dict())  # the scale of the weights follows clip_qkv
        result[name] = max_abs(changed(ids[None]).logits - logits)
    return result


def describe(config: dict[str, Any], seed: int, model: DbrxForCausalLM, single: dict[str, Tensor]) -> dict[str, Any]:
    """Evidence about one model: attention kinds agree, clipping is active, experts are uneven, mistakes would show."""
    ids = single["input_ids"]
    clipped: list[Tensor] = []
    clip = config["attn_config"]["clip_qkv"]
    hooks = [
        block.norm_attn_norm.attn.Wqkv.register_forward_hook(lambda _m, _i, y: clipped.append(y.abs() > (clip or 1e9)))
        for block in model.transformer.blocks
    ]
    out = model(ids[None], output_router_logits=True)
    for hook in hooks:
        hook.remove()
    sdpa = max_abs(build(config, seed, "sdpa")(ids[None]).logits - out.logits)
    assert sdpa < 1e-4, sdpa
    ffn_config = config["ffn_config"]
    tokens = single["router_probs"].topk(ffn_config["moe_top_k"], -1).indices
    return {
        "logits_std": out.logits.std().item(),
        "logits_max_abs": max_abs(out.logits),
        "share_of_qkv_clipped": torch.stack([c.float().mean() for c in clipped]).mean().item(),
        "tokens_of_each_expert": [
            torch.bincount(layer.flatten(), minlength=ffn_config["moe_num_experts"]).tolist() for layer in tokens
        ],
        "self_check_sdpa_against_eager": sdpa,
        "bfloat16_against_float32": bfloat16_deviation(config, seed, ids, out),
        "max_abs_change_if_wrong": sensitivity(config, seed, ids, out.logits),
    }


def make_model(config: dict[str, Any]) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Everything about one config, for the first seed that has no near-tie."""
    for seed in count():
        model = build(config, seed)
        greedy, greedy_facts = make_greedy(model, config, seed)
        if (
            greedy_facts["greedy_least_margin"] < MIN_TOKEN_MARGIN
            or greedy_facts["greedy_distinct_tokens"] < MIN_DISTINCT_TOKENS
            or greedy_facts["expert_margin_of_greedy"] < MIN_EXPERT_MARGIN
        ):
            continue
        batch, batch_facts = make_batch(model, config, seed)
        single, single_facts = make_single(model, config, seed)
        margin = expert_margin(single["router_probs"], config["ffn_config"]["moe_top_k"])
        if min(margin, batch_facts["expert_margin_of_batch"]) < MIN_EXPERT_MARGIN:
            continue
        facts = {"expert_margin_of_single": margin, **single_facts, **batch_facts, **greedy_facts}
        return seed, single | batch | greedy, facts | describe(config, seed, model, single)
    raise AssertionError


def finite(value: Any) -> Any:
    """JSON has no infinity: null says that there is no such margin. Figures are rounded to eight digits."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.8g}") if abs(value) != float("inf") else None
    return value


@torch.no_grad()
def main() -> None:
    """Write one safetensors file a config, and network_golden.json."""
    if transformers.__version__ != REFERENCE:
        sys.exit(f"needs transformers {REFERENCE}, not {transformers.__version__}: see README.md beside this script")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    models = {}
    for name, config in CONFIGS.items():
        seed, tensors, facts = make_model(config)
        small = {k: (t if t.is_floating_point() else t.int()).contiguous() for k, t in tensors.items()}
        save_file(small, DATA / f"network_{name}.safetensors")
        weights = fingerprint(make_weights(config, seed))
        models[name] = {"config": config, "seed": seed, "weights_sha256": weights, **finite(facts)}
        print(name, "seed", seed)
    golden = {
        "made_by": "tests/reference/make_network_golden.py",
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "notes": [
            "Weights: make_weights(config, seed) of tests/weights.py; float32, eager attention, one thread.",
            "Tensors of a model: network_<name>.safetensors; meaning of each in tests/reference/README.md.",
            "A margin is null where every expert is chosen.",
        ],
        "models": models,
    }
    (DATA / "network_golden.json").write_text(json.dumps(golden, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
