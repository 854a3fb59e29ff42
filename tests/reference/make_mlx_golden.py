"""Matrices quantized by MLX, and the floats that it makes of them (tests/data/mlx_golden.safetensors).

    python -m venv mlx && mlx/bin/pip install mlx==0.32.4 mlx-cpu==0.32.4 numpy safetensors
    mlx/bin/python tests/reference/make_mlx_golden.py

MLX dequantizes in the type of the scales; given the same numbers in float32 it computes in float32.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

OUT = Path(__file__).parent.parent / "data" / "mlx_golden.safetensors"
SHAPE = (3, 384)
TYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


def main() -> None:
    tensors = {}
    weights = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    for bits in (2, 3, 4, 5, 6, 8):
        for (name, dtype), group in zip(TYPES.items(), (64, 128, 32), strict=True):
            words, scales, biases = mx.quantize(mx.array(weights).astype(dtype), group_size=group, bits=bits)
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            meant = mx.dequantize(words, scales, biases, group_size=group, bits=bits)
            for part, value in {"weight": words, "scales": scales, "biases": biases, "meant": meant}.items():
                tensors[f"{name}.{bits}.{group}.{part}"] = np.array(value)
    save_file(tensors, OUT)


if __name__ == "__main__":
    main()
