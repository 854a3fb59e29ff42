"""K-quants out of floats: the gguf package makes floats of them again, which are as near as llama.cpp's own."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from model.quantization import BLOCKS, k_quants

torch.set_num_threads(1)

KINDS = ("Q4_K", "Q5_K", "Q6_K")
# Root mean square of the errors over that of the weights, of ggml_quantize_chunk of llama.cpp without an importance
# matrix on the same weights, in the order of KINDS (the library in node-llama-cpp 3.22.1).
OF_LLAMA_CPP = {
    "normal": (0.07097, 0.03591, 0.01790),
    "outliers": (0.09400, 0.04710, 0.03104),
    "negative": (0.02749, 0.01421, 0.01295),
    "sparse": (0.04762, 0.03427, 0.00638),
    "small": (3.01934, 3.02471, 1.0),
}
# The same with `matrix`, by which these errors count.
WITH_A_MATRIX = {
    "normal": (0.05332, 0.02782, 0.01368),
    "outliers": (0.07032, 0.03613, 0.02623),
    "negative": (0.02121, 0.01145, 0.00999),
    "sparse": (0.03756, 0.03075, 0.00553),
    "small": (2.98599, 3.00337, 1.0),
}


def made(name: str) -> NDArray[np.float32]:
    """Weights [8, 1024] of a distribution."""
    rng, shape = np.random.default_rng(7), (8, 1024)
    found = {
        "normal": rng.standard_normal(shape) * 0.02,
        "outliers": rng.standard_normal(shape) * np.where(rng.uniform(size=shape) < 0.01, 20, 1),
        "negative": -rng.uniform(0, 1, shape),
        "sparse": rng.standard_normal(shape) * (rng.uniform(size=shape) < 0.05),
        "small": rng.standard_normal(shape) * 1e-6,
    }
    return np.ascontiguousarray(found[name], np.float32)


def matrix() -> NDArray[np.float32]:
    """Mean squares of 1,024 inputs, a tenth of which were never seen."""
    rng = np.random.default_rng(8)
    squares = rng.standard_normal(1024) ** 2 * np.exp(rng.standard_normal(1024))
    return np.where(rng.uniform(size=1024) < 0.1, 0, squares).astype(np.float32)


def again(weights: NDArray[np.float32], kind: str, squares: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
    known = None if squares is None else torch.from_numpy(squares)
    blocks = k_quants.quantize(torch.from_numpy(weights), kind, known)
    assert blocks.shape == (len(weights), weights.shape[1] // 256 * BLOCKS[kind].nbytes) and blocks.dtype == torch.uint8
    return gguf.dequantize(blocks.numpy(), GGMLQuantizationType[kind]).astype(np.float64)


@pytest.mark.parametrize("name", OF_LLAMA_CPP)
def test_errors_are_not_above_llama_cpps(name: str) -> None:
    weights = made(name)
    for kind, theirs in zip(KINDS, OF_LLAMA_CPP[name], strict=True):
        error = np.sqrt(np.mean((again(weights, kind) - weights) ** 2) / np.mean(weights.astype(np.float64) ** 2))
        assert error <= theirs, (kind, error)


@pytest.mark.parametrize("name", WITH_A_MATRIX)
def test_errors_that_count_by_an_importance_matrix_are_not_above_them(name: str) -> None:
    weights, squares = made(name), matrix()
    for kind, theirs in zip(KINDS, WITH_A_MATRIX[name], strict=True):
        wrong = (again(weights, kind, squares) - weights) ** 2
        error = np.sqrt(np.sum(squares * wrong) / np.sum(squares * weights.astype(np.float64) ** 2))
        assert error <= theirs, (kind, error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.75, -3.0, 1e-30, 3e38])
def test_weights_that_are_all_the_same(kind: str, value: float) -> None:
    found = again(np.full((2, 512), value, np.float32), kind)
    assert np.isfinite(found).all()
    if abs(value) < 1e30:
        assert np.allclose(found, value, rtol=2e-3, atol=1e-6)
