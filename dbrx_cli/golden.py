"""A small network with known answers: `dbrx doctor` computes them again, so that a wrong build of torch shows.

The weights come from a formula, the answers from the reference implementation (tests/reference/make_doctor_golden.py).
No two dimensions are equal, so that no mix-up of shapes goes unseen. Numpy is enough to import it, for the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3  # of logits that reach 3: float32 sums in another order differ by about 1e-5
CONFIG: dict[str, Any] = {
    "model_type": "dbrx",
    "d_model": 24,
    "n_heads": 6,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 29,
    "attn_config": {"clip_qkv": 2.5, "kv_n_heads": 2, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 5, "moe_top_k": 3},
}
IDS = [(11 * i * i + 5 * i + 3) % 29 for i in range(40)]
# Logits of the token after IDS.
EXPECTED = (
    -0.5450, 0.0988, 0.1870, 0.1940, -0.7410, 0.0700, 1.3065, 1.0534, 1.4953, -1.8319,
    -1.2053, 2.7286, 1.2304, 0.0409, 0.2600, 0.2168, -1.6298, -1.5284, 2.6515, -0.4425,
    -0.9854, 2.6156, 0.9109, -0.1646, -2.3684, -0.3926, -1.3077, 1.2995, -0.8397,
)  # fmt: skip


def make_weights() -> dict[str, NDArray[np.float32]]:
    """The network's weights by the checkpoint's names: a sine whose phase grows with the square of the place."""
    width, ffn = CONFIG["d_model"], CONFIG["ffn_config"]
    stacked = (ffn["moe_num_experts"] * ffn["ffn_hidden_size"], width)
    head_dim, kv_heads = width // CONFIG["n_heads"], CONFIG["attn_config"]["kv_n_heads"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (CONFIG["vocab_size"], width)}
    for layer in range(CONFIG["n_layers"]):
        block = f"transformer.blocks.{layer}."
        shapes |= {
            f"{block}norm_attn_norm.norm_1.weight": (width,),
            f"{block}norm_attn_norm.attn.Wqkv.weight": (width + 2 * kv_heads * head_dim, width),
            f"{block}norm_attn_norm.attn.out_proj.weight": (width, width),
            f"{block}norm_attn_norm.norm_2.weight": (width,),
            f"{block}ffn.router.layer.weight": (ffn["moe_num_experts"], width),
            **{f"{block}ffn.experts.mlp.{name}": stacked for name in ("w1", "v1", "w2")},
        }
    shapes |= {"transformer.norm_f.weight": (width,), "lm_head.weight": (CONFIG["vocab_size"], width)}
    return {name: _values(place, shape) for place, (name, shape) in enumerate(shapes.items())}


def _values(place: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    i = np.arange(1, np.prod(shape) + 1, dtype=np.float64)
    wave = np.sin(0.37 * i * i + place)
    values = 1 + 0.2 * wave if len(shape) == 1 else wave * 2 / np.sqrt(shape[-1])
    return values.astype(np.float32).reshape(shape)


def largest_difference(device: torch.device, attention: str) -> float:
    """How far this machine's logits are from the reference's: read whole, and token by token behind a cache."""
    import torch

    from model.causal_lm import DbrxForCausalLM
    from model.config import DbrxConfig
    from model.kv_cache import KVCache

    network = DbrxForCausalLM(DbrxConfig.from_dict(CONFIG), attention).eval()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in make_weights().items()})
    network = network.to(device)
    expected, ids = torch.tensor(EXPECTED), torch.tensor([IDS], device=device)
    with torch.inference_mode():
        whole = network(ids, use_cache=False).logits[0, -1]
        cache = KVCache(CONFIG["n_layers"])
        network(ids[:, :-3], past_key_values=cache)
        for column in range(len(IDS) - 3, len(IDS)):
            stepped = network(ids[:, column : column + 1], past_key_values=cache).logits[0, -1]
    found = torch.stack([whole, stepped]).float().cpu()
    # A number that is no number is as far away as can be.
    return float((found - expected).abs().nan_to_num(nan=float("inf")).max())
