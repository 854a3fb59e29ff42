"""Which of a layer's experts lie on a card where the CPU has the others: those that tokens choose most.

How many lie on either side a plan decides; here, which ones. Imports without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import sqrt
from typing import NamedTuple

Counts = Sequence[Sequence[int]]  # [layers][experts]: tokens of decoding that chose an expert

PRIOR = 16  # choices of each expert that are added to those counted: a few tokens say little
CERTAIN = 3.0  # standard deviations by which two counts must differ: of 16 experts some always differ by two
PAYS_WITHIN = 256  # tokens, some replies, in which a move must save the seconds that it takes
PAUSE = 0.25  # seconds of moves before a reply


def known(use: Counts, layers: int, experts: int) -> Counts:
    """Counts for each expert of a network: zeros where they are not of one like it."""
    fits = len(use) == layers and all(len(counts) == experts for counts in use)
    return use if fits else [[0] * experts] * layers


def shares(counts: Sequence[int]) -> list[float]:
    """What share of a layer's choices falls on each expert; the same on all where nothing was counted."""
    total = sum(counts) + PRIOR * len(counts)
    return [(count + PRIOR) / total for count in counts]


def least_used(counts: Sequence[int], count: int) -> tuple[int, ...]:
    """So many experts, those for the CPU; of equals the last."""
    return tuple(sorted(sorted(range(len(counts)), key=lambda expert: (counts[expert], -expert))[:count]))


class Move(NamedTuple):
    """Two experts of a layer change places: one comes to the card, one goes to the CPU."""

    layer: int
    comes: int
    goes: int


def moves(use: Counts, away: Sequence[Collection[int]], top_k: int, sooner: float, bus: float) -> list[Move]:
    """What is worth moving before the next reply, what saves most first.

    away: each layer's experts on the CPU; sooner: seconds by which the card has computed an expert for one token before
    the CPU has; bus: seconds of an expert's way, of which a move takes two. The CPU's most used expert is compared with
    the card's least used one, then the second of each, ... Of 4,000 choices counted in a layer (1,000 tokens, 4 of 16)
    400 fell on one that the CPU has and 150 on one on the card: 250 is more than 3 sqrt(550) = 70; the shares differ by
    250 / 4,256, for a token by 0.23 experts; at 1.4 ms that is 0.33 ms a token, 84 in 256 tokens, for a move of 10.
    """
    found = []
    for layer, (counts, of_cpu) in enumerate(zip(use, away, strict=True)):
        falls, order = shares(counts), sorted(range(len(counts)), key=lambda expert: -counts[expert])
        coming = [expert for expert in order if expert in of_cpu]
        going = [expert for expert in reversed(order) if expert not in of_cpu]
        for comes, goes in zip(coming, going):  # noqa: B905  # the shorter side decides
            is_certain = counts[comes] - counts[goes] > CERTAIN * sqrt(counts[comes] + counts[goes])
            saved = top_k * (falls[comes] - falls[goes]) * sooner  # seconds a token
            if is_certain and saved * PAYS_WITHIN > 2 * bus:
                found.append((saved, Move(layer, comes, goes)))
    found.sort(reverse=True)
    return [move for i, (_, move) in enumerate(found, 1) if i * 2 * bus <= PAUSE]
