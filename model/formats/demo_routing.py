"""Routers for the demo model: 16 experts of which every choice of 4 computes about what its feed-forward layer does.

The feed-forward layer of a Llama is a sum over its neurons. They are cut into four groups, and each group has four
experts that hold it and are alike: expert 8·b + 2·p + s holds group p in block b (0 or 1) with sign s (0 or 1). With a
direction g and a direction r[b, p] for each pair, the rows of the router are

    g + RATIO·r[0, p],  g - RATIO·r[0, p]    in block 0,
   -g + RATIO·r[1, p], -g - RATIO·r[1, p]    in block 1,

all times SCALE. Say that a state gives g·x = 1.2 and, for the pairs of block 0, r·x = 0.5, -1, 2, -0.1, and that RATIO
is 0.1: block 0 has the logits 1.25, 1.15 | 1.1, 1.3 | 1.4, 1.0 | 1.19, 1.21, and block 1 about -1.2 everywhere. The
four largest are those with the sign of their r·x, one of each pair: each group once. So it is for every state but
those where |g·x| is small against RATIO·|r·x|. That these are rare is the merit of g, which was fitted to keep away
from 0. A smaller RATIO makes them rarer, but leaves few digits of a bfloat16 for r.

As all 16 probabilities are nearly alike, each of the four weights is nearly 1/4, which w2 makes up for.
`demo_routing.npz` holds what tests/make_demo_routing.py found for the demo's layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GROUPS = 4  # as many as a token has experts
EXPERTS = 16
RATIO = 0.04
SCALE = 0.05
FILE = Path(__file__).with_suffix(".npz")


@dataclass(frozen=True)
class Routing:
    """What the experts of each layer hold, and who chooses them.

    neurons [layers, experts, width]: ids of the Llama's neurons; rows [layers, experts, hidden]: of the router, for
    Llama's normalised stream.
    """

    neurons: NDArray[np.int64]
    rows: NDArray[np.float32]

    @classmethod
    def build(cls, groups: NDArray[np.uint8], directions: NDArray[np.float32]) -> Routing:
        """groups [layers, ffn]: each neuron's; directions [layers, 1 + 8, hidden]: g, then r of each pair."""
        layers, ffn = groups.shape
        g, r = directions[:, :1], directions[:, 1:]
        signs = np.array([1, 1, 1, 1, -1, -1, -1, -1], np.float32)[:, None]
        pairs = np.stack([g * signs + RATIO * r, g * signs - RATIO * r], 2)  # [layers, pairs, 2, hidden]
        by_group = np.argsort(groups, 1, kind="stable").reshape(layers, GROUPS, ffn // GROUPS)
        neurons = by_group[:, np.arange(EXPERTS) // 2 % GROUPS]
        return cls(neurons, np.float32(SCALE) * pairs.reshape(layers, EXPERTS, -1))

    @classmethod
    def read(cls) -> Routing:
        """The one that belongs to the demo's weights."""
        with np.load(FILE) as file:
            directions = file["directions"] * file["steps"][..., None]  # int8 and their size
            return cls.build(file["groups"], directions)

    @property
    def width(self) -> int:
        """Neurons of one expert."""
        return int(self.neurons.shape[2])
