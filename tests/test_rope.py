"""The angles of a position that is asked for alone, against those of a table, and these against their definition."""

import math

import pytest
import torch

from model.rope import WINDOW, rotary_rows, rotary_table

HEAD_DIM, THETA = 64, 500000.0
CPU = torch.device("cpu")


@pytest.mark.parametrize("position", [0, 1, WINDOW - 1, WINDOW, 3 * WINDOW + 7, 32767])
def test_a_lone_position(position: int) -> None:
    with torch.inference_mode():
        cos, sin = rotary_rows([position], HEAD_DIM, THETA, CPU)
    assert cos.shape == sin.shape == (1, 1, 1, HEAD_DIM)
    for found, meant in zip((cos, sin), rotary_table(torch.tensor([[position]]), HEAD_DIM, THETA), strict=True):
        torch.testing.assert_close(found, meant, rtol=0, atol=1e-6)
    half = HEAD_DIM // 2
    for i in (0, 1, half - 1):
        angle = position * THETA ** (-i / half)
        near = 1e-6 + 1e-7 * angle  # angles are float32
        assert cos[0, 0, 0, i] == cos[0, 0, 0, i + half] == pytest.approx(math.cos(angle), abs=near)
        assert -sin[0, 0, 0, i] == sin[0, 0, 0, i + half] == pytest.approx(math.sin(angle), abs=near)


def test_rows_at_different_places() -> None:
    places = [7, WINDOW, 5 * WINDOW + 3, 7]
    for found, meant in zip(
        rotary_rows(places, HEAD_DIM, THETA, CPU),
        rotary_table(torch.tensor(places)[:, None], HEAD_DIM, THETA),
        strict=True,
    ):
        assert found.shape == (4, 1, 1, HEAD_DIM)
        torch.testing.assert_close(found, meant, rtol=0, atol=1e-6)


def test_what_is_kept_serves_with_gradients_too() -> None:
    with torch.inference_mode():
        rotary_rows([5], HEAD_DIM, THETA, CPU)
    cos, _ = rotary_rows([5], HEAD_DIM, THETA, CPU)
    x = torch.ones(HEAD_DIM, requires_grad=True)
    (x * cos).sum().backward()
    assert torch.equal(x.grad, cos.flatten())
