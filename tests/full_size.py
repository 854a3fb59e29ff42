"""A checkpoint of DBRX's real shapes that takes no disk: sparse files, in which almost everything is a hole of zeros.

    python -m tests.full_size FOLDER        263 GB of addresses in 61 shards, about 25 MB of disk

What is not zero is enough to tell experts apart. A few tokens have embeddings (random signs) and rows in the head.
Each router sends each of these tokens to four experts of its own. Each expert has one block of numbers in each of its
matrices, in one row of them: often the first or the last, so that a slice that is off by one shows. Attention is zero.
So `expected` can say in numpy, from these numbers alone, what the network must answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.weights import parameter_shapes

Vector = NDArray[np.float64]

REAL: dict[str, Any] = {
    "model_type": "dbrx",
    "architectures": ["DbrxForCausalLM"],
    "torch_dtype": "bfloat16",
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "max_seq_len": 32768,
    "vocab_size": 100352,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_jitter_eps": 0},
}
SHARD = 4_950_000_000  # bytes: what makes 61 of them
TOKENS = (9906, 1917, 374, 264, 3446, 315, 279, 1296)  # of cl100k_base: "Hello", " world", ...
CHOSEN, OTHERS = 3.0, -3.0  # router logits of the experts of a token, and of all others
SHARE = 0.15  # of an embedding's size: what one expert adds


@dataclass(frozen=True)
class Sentinel:
    """What one expert holds: in row `row`, from column `column` on, the same in w1 and v1, and another in w2."""

    row: int
    column: int
    gate: Vector
    out: Vector


@dataclass(frozen=True)
class Numbers:
    """All that is not zero; the same from the same configuration and tokens, everywhere."""

    config: dict[str, Any]
    tokens: Sequence[int]
    embeddings: Vector  # [tokens, d_model]
    head: Vector  # [tokens, d_model]
    routers: list[Vector]  # [experts, d_model] a layer

    @classmethod
    def of(cls, config: dict[str, Any], tokens: Sequence[int] = TOKENS) -> Numbers:
        rng = np.random.RandomState(5)
        d, n_experts = config["d_model"], config["ffn_config"]["moe_num_experts"]
        embeddings = rng.choice([-1.0, 1.0], (len(tokens), d))
        # Each token follows the one before it, and all have scores of their own.
        head = bfloat16((rng.choice([-1.0, 1.0], (len(tokens), d)) + 0.5 * np.roll(embeddings, 1, axis=0)) / 512)
        routers = []
        for _ in range(config["n_layers"]):
            scores = np.full((n_experts, len(tokens)), OTHERS)
            for token in range(len(tokens)):
                scores[rng.permutation(n_experts)[: config["ffn_config"]["moe_top_k"]], token] = CHOSEN
            scores += 0.05 * rng.randint(-5, 6, scores.shape)
            routers.append(bfloat16(scores @ embeddings / d))
        return cls(config, tokens, embeddings, head, routers)

    def sentinel(self, layer: int, expert: int) -> Sentinel:
        """The numbers of one expert."""
        d, hidden = self.config["d_model"], self.config["ffn_config"]["ffn_hidden_size"]
        block = d // 3  # at the real size 4096 bytes
        rng = np.random.RandomState(1000 * layer + expert)
        row = (0, hidden - 1, int(rng.randint(hidden)))[(layer + expert) % 3]
        column = block * int(rng.randint(3))
        strength = (2.5 + 0.1 * rng.randint(10)) / block
        gate = strength * self.embeddings[:, column : column + block].sum(0)
        return Sentinel(row, column, bfloat16(gate), bfloat16(SHARE / 1.2 * rng.choice([-1.0, 1.0], block)))

    def pieces(self) -> Iterator[tuple[str, int, Vector]]:
        """Name of a tensor, index of an element, and what lies there from it on."""
        d, hidden = self.config["d_model"], self.config["ffn_config"]["ffn_hidden_size"]
        for token, embedding, row in zip(self.tokens, self.embeddings, self.head, strict=True):
            yield "transformer.wte.weight", token * d, embedding
            yield "lm_head.weight", token * d, row
        yield "transformer.norm_f.weight", 0, np.ones(d)
        for layer, router in enumerate(self.routers):
            prefix = f"transformer.blocks.{layer}"
            yield f"{prefix}.norm_attn_norm.norm_1.weight", 0, np.ones(d)
            yield f"{prefix}.norm_attn_norm.norm_2.weight", 0, np.ones(d)
            yield f"{prefix}.ffn.router.layer.weight", 0, router
            for expert in range(len(router)):
                sentinel = self.sentinel(layer, expert)
                start = (expert * hidden + sentinel.row) * d + sentinel.column
                for matrix, values in (("w1", sentinel.gate), ("v1", sentinel.gate), ("w2", sentinel.out)):
                    yield f"{prefix}.ffn.experts.mlp.{matrix}", start, values

    def logits(self, token: int) -> Vector:
        """What the head says of each of `tokens` behind one of them, in float64."""
        x = self.embeddings[self.tokens.index(token)].copy()
        top_k = self.config["ffn_config"]["moe_top_k"]
        for layer, router in enumerate(self.routers):
            normed = normalized(x)
            scores = router @ normed
            chosen = np.argsort(-scores)[:top_k]
            weights = np.exp(scores[chosen]) / np.exp(scores[chosen]).sum()
            y = np.zeros_like(x)
            for expert, weight in zip(chosen, weights, strict=True):
                sentinel = self.sentinel(layer, int(expert))
                part = slice(sentinel.column, sentinel.column + len(sentinel.gate))
                gate = float(sentinel.gate @ normed[part])
                y[part] += weight * gate / (1 + np.exp(-gate)) * gate * sentinel.out
            x += y
        return self.head @ normalized(x)

    def greedy(self, token: int, count: int) -> list[int]:
        """The ids that follow `token`. Nothing else may be near: zero is the score of all tokens that have no row."""
        ids: list[int] = []
        for _ in range(count):
            scores = self.logits(token)
            first, second = np.sort(scores)[[-1, -2]]
            assert first > max(second, 0) + 0.03 * np.abs(scores).max()
            token = self.tokens[int(scores.argmax())]
            ids.append(token)
        return ids


def normalized(x: Vector) -> Vector:
    """LayerNorm with weight 1."""
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


def bfloat16(values: Vector) -> Vector:
    """The nearest numbers that bfloat16 has."""
    return (_bits(values).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _bits(values: Vector) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def make(folder: Path, numbers: Numbers, shard_size: int = SHARD) -> Path:
    """Write the checkpoint: headers, index, configuration, and the pieces; the rest are holes."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = parameter_shapes(numbers.config)
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and sum(shards[-1].values()) + nbytes > shard_size:
            shards.append({})
        shards[-1][name] = nbytes
    places: dict[str, tuple[Path, int]] = {}
    for number, sizes in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name, nbytes in sizes.items():
            offsets = [position, position := position + nbytes]
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + position)
        places |= {name: (path, 8 + len(text) + header[name]["data_offsets"][0]) for name in sizes}
    for name, index, values in numbers.pieces():
        path, start = places[name]
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, _bits(values).tobytes(), start + 2 * index)
        os.close(fd)
    total = sum(sum(sizes.values()) for sizes in shards)
    weight_map = {name: path.name for name, (path, _) in places.items()}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", numbers.config)
    write_json(folder / "generation_config.json", {"eos_token_id": [100257, 100279]})
    return folder


def size(path: Path) -> tuple[int, int]:
    """Bytes of addresses, and bytes on disk."""
    status = path.stat()
    return status.st_size, 512 * status.st_blocks


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    made = Numbers.of(REAL)
    files = sorted(make(Path(sys.argv[1]), made).glob("*.safetensors"))
    addressed, stored = (sum(n) for n in zip(*map(size, files), strict=True))
    print(f"{len(files)} shards, {addressed / 1e9:.1f} GB, {stored / 1e6:.0f} MB on disk")
    print(f'" test" ({TOKENS[-1]}) is followed by {made.greedy(TOKENS[-1], 5)}')
