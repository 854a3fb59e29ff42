"""A checkpoint of DBRX's real shapes that takes no disk: sparse files, in which almost everything is a hole of zeros.

    python -m tests.full_size FOLDER        263 GB of addresses in 61 shards, about 25 MB of disk
    python -m tests.full_size FOLDER int3   57 GB in 12 shards, in the layout of `dbrx quantize`, about 120 MB

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

from model.config import DbrxConfig
from model.formats.quantized import layout
from tests.weights import parameter_shapes

Vector = NDArray[np.float64]
Pieces = Iterator[tuple[str, int, bytes]]  # name of a tensor, a byte of it, and what lies there from it on
WIDTHS = {"BF16": 2, "F32": 4, "I8": 1, "U8": 1}

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
GROUP = 128  # inputs of int3 that share scale and zero point
OUTPUTS = 32  # that an expert in int3 writes: each lies in a block of the disk of its own


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

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every tensor."""
        return {name: ("BF16", shape) for name, shape in parameter_shapes(self.config).items()}

    def settings(self) -> dict[str, Any]:
        """config.json."""
        return self.config

    def pieces(self) -> Pieces:
        for name, index, values in self._floats():
            yield name, 2 * index, _bits(values).tobytes()

    def _floats(self) -> Iterator[tuple[str, int, Vector]]:
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


class Int3Numbers(Numbers):
    """The same in int3, by numbers that it holds exactly: holes are levels, scales and zero points of 0."""

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        few = layout(DbrxConfig.from_dict(self.config), "int3", GROUP)
        floats = {
            name: ("BF16", shape)
            for name, shape in parameter_shapes(self.config).items()
            if ".ffn.experts." not in name and f"{name.removesuffix('weight')}scale" not in few
        }
        return floats | few

    def settings(self) -> dict[str, Any]:
        few = {"quant_method": "dbrx", "version": 1, "kind": "int3", "group": GROUP}
        return self.config | {"torch_dtype": "float32", "quantization_config": few}

    def sentinel(self, layer: int, expert: int) -> Sentinel:
        whole = super().sentinel(layer, expert)
        scale, levels = self._gate(whole)
        out = bfloat16(np.sign(whole.out) * 8 * SHARE / 1.2)
        out[OUTPUTS:] = 0
        return Sentinel(whole.row, whole.column, scale * (levels - 3.0), out)

    @staticmethod
    def _gate(sentinel: Sentinel) -> tuple[float, NDArray[np.uint8]]:
        """Scale and levels around zero point 3: of sums of eight signs, the least one is lifted."""
        scale = bfloat16(np.abs(sentinel.gate).max() / 4).item()
        return scale, np.clip(np.rint(sentinel.gate / scale) + 3, 0, 7).astype(np.uint8)

    def pieces(self) -> Pieces:
        d, hidden = self.config["d_model"], self.config["ffn_config"]["ffn_hidden_size"]
        for name, index, values in self._floats():
            if name == "lm_head.weight":  # halves of 512: 1.5 or 0.5 of either sign
                yield name, index, np.rint(values * 1024).astype(np.int8).tobytes()
                yield "lm_head.scale", index // d * 4, np.float32(1 / 1024).tobytes()
            elif ".ffn.experts." not in name:
                yield name, 2 * index, _bits(values).tobytes()
        for layer, router in enumerate(self.routers):
            for expert in range(len(router)):
                sentinel = self.sentinel(layer, expert)
                scale, levels = self._gate(super().sentinel(layer, expert))
                prefix = f"transformer.blocks.{layer}.ffn.experts.{expert}."
                for matrix in ("w1", "v1"):
                    yield from _int3(f"{prefix}{matrix}.", sentinel.row, d, sentinel.column, levels, scale, 3)
                first = sentinel.row // GROUP * GROUP
                for output, value in enumerate(sentinel.out[:OUTPUTS], sentinel.column):
                    levels = np.ones(min(GROUP, hidden - first), np.uint8)  # 1 is nothing
                    levels[sentinel.row - first] = 1 + np.sign(value)
                    yield from _int3(f"{prefix}w2.", output, hidden, first, levels, abs(value), 1)


def _int3(
    prefix: str, row: int, inputs: int, first: int, levels: NDArray[np.uint8], scale: float, zero: float
) -> Pieces:
    """Levels of whole groups of a row, from an input on."""
    bits = np.unpackbits(levels[:, None], axis=1, bitorder="little")[:, :3]
    low, third = (np.packbits(part.reshape(-1), bitorder="little") for part in (bits[:, :2], bits[:, 2]))
    start = row * inputs * 3 // 8
    yield f"{prefix}weight", start + first // 4, low.tobytes()
    yield f"{prefix}weight", start + inputs // 4 + first // 8, third.tobytes()
    groups = -(-len(levels) // GROUP)
    for part, value in (("scale", scale), ("zero", zero)):
        at = 2 * (row * -(-inputs // GROUP) + first // GROUP)
        yield f"{prefix}{part}", at, _bits(np.full(groups, value)).tobytes()


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
    entries = numbers.entries()
    shards: list[dict[str, int]] = [{}]
    for name, (dtype, shape) in entries.items():
        nbytes = WIDTHS[dtype] * int(np.prod(shape))
        if shards[-1] and sum(shards[-1].values()) + nbytes > shard_size:
            shards.append({})
        shards[-1][name] = nbytes
    places: dict[str, tuple[Path, int]] = {}
    for number, sizes in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name, nbytes in sizes.items():
            offsets = [position, position := position + nbytes]
            header[name] = {"dtype": entries[name][0], "shape": list(entries[name][1]), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + position)
        places |= {name: (path, 8 + len(text) + header[name]["data_offsets"][0]) for name in sizes}
    for name, at, written in numbers.pieces():
        path, start = places[name]
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, written, start + at)
        os.close(fd)
    total = sum(sum(sizes.values()) for sizes in shards)
    weight_map = {name: path.name for name, (path, _) in places.items()}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", numbers.settings())
    write_json(folder / "generation_config.json", {"eos_token_id": [100257, 100279]})
    return folder


def size(path: Path) -> tuple[int, int]:
    """Bytes of addresses, and bytes on disk."""
    status = path.stat()
    return status.st_size, 512 * status.st_blocks


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    made = (Int3Numbers if sys.argv[2:] == ["int3"] else Numbers).of(REAL)
    files = sorted(make(Path(sys.argv[1]), made).glob("*.safetensors"))
    addressed, stored = (sum(n) for n in zip(*map(size, files), strict=True))
    print(f"{len(files)} shards, {addressed / 1e9:.1f} GB, {stored / 1e6:.0f} MB on disk")
    print(f'" test" ({TOKENS[-1]}) is followed by {made.greedy(TOKENS[-1], 5)}')
