"""What `dbrx plan` predicts against what `dbrx bench` measures, on scaled-down models with large experts."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.formats import open_weights
from model.formats.write_quantized import Writer
from tests.cli import COMMAND, ROOT, environment
from tests.weights import parameter_shapes

ROUNDS = 3  # plan and bench in turn: what else the machine does changes
# DBRX's proportions, at a quarter of its width with three layers, at three eighths of it with one.
SHAPES = {"three layers": (1536, 3, 12), "one layer": (2304, 1, 18)}
STREAMED = ("--offload", "disk", "--expert-cache")
CASES = {
    "bfloat16 in memory": ("bfloat16", ()),
    "int8 in memory": ("int8", ()),
    "bfloat16 from disk": ("bfloat16", (*STREAMED, "200MiB")),
    "int8 from disk": ("int8", (*STREAMED, "150MiB")),
}


def make(folder: Path, width: int, layers: int, heads: int) -> Path:
    """Weights of which a part is random, and then repeats; routers and embeddings are random, so routing is even."""
    config: dict[str, Any] = {
        "d_model": width, "n_layers": layers, "n_heads": heads, "max_seq_len": 4096, "vocab_size": 8192,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": heads // 6, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": width * 7 // 4, "moe_num_experts": 16, "moe_top_k": 4},
    }  # fmt: skip
    rng = torch.Generator().manual_seed(5)
    pool = torch.randn(2**22, generator=rng) / width**0.5

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        if len(shape) == 1:
            return torch.ones(shape)
        if "router" in name or "wte" in name:
            return torch.randn(shape, generator=rng) * (width**-0.5 if "router" in name else 1)
        return pool.repeat(-(-count // len(pool)))[:count].view(shape)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "dbrx", **config}))
    tensors = {name: tensor(name, shape).bfloat16() for name, shape in parameter_shapes(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=SHAPES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in each format."""
    folder = tmp_path_factory.mktemp("prediction")
    floats = make(folder / "bfloat16", *SHAPES[request.param])
    with open_weights(floats) as weights:
        Writer(weights, folder / "int8", "int8", 32).write(lambda _: None)
    return {"bfloat16": floats, "int8": folder / "int8"}


def dbrx(*args: str | Path) -> dict[str, Any]:
    env = environment(OMP_NUM_THREADS=str(len(os.sched_getaffinity(0))))
    done = subprocess.run([*COMMAND, *map(str, args), "--json"], env=env, cwd=ROOT, capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.bench
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_the_prediction_is_within_a_quarter(stored: dict[str, Path], case: str) -> None:
    format, options = CASES[case]
    ratios, rounds = [], []
    for _ in range(ROUNDS):
        plan = dbrx("plan", stored[format], *options)
        row = dbrx("bench", stored[format], *options, "--prompt-tokens", "16", "--new-tokens", "32")["results"][0]
        predicted, measured = plan["tokens_per_s_predicted"], row["decode_tokens_per_s"]
        assert predicted < plan["tokens_per_s_ceiling"]
        ratios.append(predicted / measured)
        rounds.append(f"{predicted:.3g}/{measured:.3g}")
    print(f"{case}: predicted {statistics.median(ratios):.2f} of what was measured; tokens/s {' '.join(rounds)}")
    assert abs(statistics.median(ratios) - 1) < 0.25
