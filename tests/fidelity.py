"""How far this network is from the reference (transformers 4.57.6), figure by figure: `make fidelity`.

The tests hold the same figures to their bounds (test_fidelity.py); docs/fidelity.md shows them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model import DbrxConfig, DbrxForCausalLM, KVCache
from model.attention.flash import FlashAttention
from model.prefill import prefill
from tests import flash_stand_in
from tests.weights import fingerprint, make_weights

DATA = Path(__file__).parent / "data"
DOCS = Path(__file__).parent.parent / "docs" / "fidelity.md"
GOLDEN = json.loads((DATA / "network_golden.json").read_text("utf-8"))["models"]
BACKENDS = ("eager", "sdpa", "flash")
BEGIN, END = "<!-- figures: written by `make fidelity` -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Case:
    """One small model: our network with the reference's weights, and what the reference computed."""

    name: str
    network: DbrxForCausalLM
    facts: dict[str, Any]
    data: dict[str, Tensor]


@cache
def weights_of(name: str) -> dict[str, Tensor]:
    """The reference's weights of a golden config; to be copied."""
    facts = GOLDEN[name]
    weights = make_weights(facts["config"], facts["seed"])
    assert fingerprint(weights) == facts["weights_sha256"], "these are not the weights that the reference had"
    return {key: torch.from_numpy(value) for key, value in weights.items()}


def load(name: str, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Case:
    """Our network of a golden config. `flash` is the backend's code on a stand-in for the package."""
    facts = GOLDEN[name]
    config = DbrxConfig.from_dict({"model_type": "dbrx", **facts["config"]})
    network = DbrxForCausalLM(config, "eager" if attention == "flash" else attention).eval()
    network.load_state_dict(weights_of(name))
    if attention == "flash":
        network.transformer._attend = FlashAttention(flash_stand_in)  # type: ignore[arg-type]
    network.prefill_chunk = 50  # the long prompt is read in several
    data = load_file(DATA / f"network_{name}.safetensors")
    return Case(name, network.to(dtype), facts, {k: t if t.is_floating_point() else t.long() for k, t in data.items()})


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference."""
    return float((ours.float() - theirs.float()).abs().max())


@torch.inference_mode()
def logits(case: Case) -> dict[str, float]:
    """Largest difference of the logits, by the way they were computed."""
    data, network = case.data, case.network
    ids, positions = data["input_ids"][None], data["positions"]
    left, right = data["batch_left_mask"].bool(), data["batch_right_mask"].bool()
    whole = network(ids).logits[0, positions]
    padded = network(data["batch_left_ids"], left, data["batch_left_positions"]).logits[left]
    return {
        "331 positions": distance(whole, data["logits"]),
        "padded left": distance(padded, data["batch_logits"]),
        "padded right": distance(network(data["batch_right_ids"], right).logits[right], data["batch_logits"]),
        "in chunks": distance(_chunked(network, ids)[positions], data["logits"]),
        "prefill": distance(prefill(network, ids, KVCache(network.config.n_layers))[0], data["logits"][-1]),
    }


def _chunked(network: DbrxForCausalLM, ids: Tensor, chunk: int = 64) -> Tensor:
    """Logits [seq, vocab] of a prompt that is read in pieces into the cache."""
    cache = KVCache(network.config.n_layers, block_tokens=16)
    parts = [network(part, past_key_values=cache).logits[0] for part in ids.split(chunk, dim=1)]
    return torch.cat(parts)


@torch.inference_mode()
def internals(case: Case) -> dict[str, float]:
    """Largest difference of what lies inside: last hidden state, router probabilities, attention weights."""
    data, ids = case.data, case.data["input_ids"][None]
    out = case.network(ids, output_hidden_states=True, output_router_logits=True)
    prefix = data["prefix_attentions"].shape[-1]
    attentions = case.network(ids[:, :prefix], output_attentions=True).attentions
    assert out.hidden_states and out.router_logits and attentions
    return {
        "hidden state": distance(out.hidden_states[-1][0, data["positions"]], data["last_hidden_state"]),
        "router": distance(torch.stack(out.router_logits), data["router_probs"]),
        "attention": distance(torch.stack(attentions)[:, 0], data["prefix_attentions"]),
    }


@torch.inference_mode()
def losses(case: Case) -> dict[str, float]:
    """Largest difference of cross-entropy, auxiliary and total loss: alone, padded with and without a mask."""
    data = case.data
    ids, labels = data["batch_right_ids"], data["batch_right_labels"]
    inputs: dict[str, tuple[Tensor, Tensor | None, Tensor]] = {
        "loss_single": (data["input_ids"][None], None, data["labels"][None]),
        "loss_batch_right_masked": (ids, data["batch_right_mask"], labels),
        "loss_batch_right_unmasked": (ids, None, labels),
    }
    result = {"cross-entropy": 0.0, "auxiliary": 0.0, "total": 0.0}
    for key, (tokens, mask, targets) in inputs.items():
        expected = case.facts[key]
        plain = case.network(tokens, data["batch_right_mask"] if key.startswith("loss_batch") else mask, labels=targets)
        full = case.network(tokens, mask, labels=targets, output_router_logits=True)
        for name, ours, theirs in (
            ("cross-entropy", plain.loss, expected["cross_entropy"]),
            ("auxiliary", full.aux_loss, expected["auxiliary"]),
            ("total", full.loss, expected["total"]),
        ):
            assert ours is not None
            result[name] = max(result[name], abs(float(ours) - theirs))
    return result


def greedy(case: Case) -> dict[str, float]:
    """Largest difference of the last logits that `generate` sees, one token at a time behind the cached prompt; and
    how many of the reference's greedy tokens it gives, from the first on.
    """
    expected, last = case.data["greedy_ids"], case.data["greedy_last_logits"]
    prompt, steps = case.data["greedy_prompt"][None], list[Tensor]()
    hook = case.network.lm_head.register_forward_hook(lambda _, inputs, out: steps.append(out.reshape(-1)))
    ours = case.network.generate(prompt, max_new_tokens=len(expected), do_sample=False)[0, prompt.shape[1] :]
    hook.remove()
    assert len(steps) == len(expected)
    return {
        "cached decode": distance(torch.stack(steps[-len(last) :]), last),
        "greedy tokens": int((ours == expected).long().cumprod(0).sum()),
    }


@torch.inference_mode()
def bfloat16(name: str, attention: str) -> dict[str, float]:
    """Distance of our bfloat16 logits from the float32 reference, beside the reference's own."""
    case = load(name, attention, torch.bfloat16)
    error = case.network(case.data["input_ids"][None]).logits[0, case.data["positions"]].float() - case.data["logits"]
    theirs = case.facts["bfloat16_against_float32"]["eager" if attention == "flash" else attention]
    return {"mean": float(error.abs().mean()), "their mean": theirs["mean_abs"], "max": float(error.abs().max()),
            "their max": theirs["max_abs"]}  # fmt: skip


def figures() -> str:
    """All figures as Markdown."""
    lines = ["Largest absolute difference from the reference, float32:", ""]
    rows = [logits(load(name, backend)) | greedy(load(name, backend))
            for name in GOLDEN for backend in BACKENDS]  # fmt: skip
    heads = [f"{name}, {backend}" for name in GOLDEN for backend in BACKENDS]
    lines += _table("logits of", heads, rows)
    inside = [internals(load(name)) | losses(load(name)) for name in GOLDEN]
    lines += ["", "Inside the network, and losses (eager, float32):", "", *_table("model", list(GOLDEN), inside)]
    lines += ["", "bfloat16 logits against float32 logits of the reference, ours beside the reference's own:", ""]
    lines += _table("model (sdpa)", list(GOLDEN), [bfloat16(name, "sdpa") for name in GOLDEN])
    return "\n".join(lines)


def _table(corner: str, heads: list[str], rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    lines = [f"| {corner} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for head, row in zip(heads, rows, strict=True):
        cells = (str(row[n]) if isinstance(row[n], int) else f"{row[n]:.1e}" for n in names)
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the figures, and put them into docs/fidelity.md."""
    text = figures()
    print(text)
    page = DOCS.read_text("utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
