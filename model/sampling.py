"""Way 5: logits -> the next id. `SamplingParams` needs no torch; the functions are pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MIN_TEMPERATURE = 1e-3  # but for 0, which is greedy
MAX_LOOKUP = 64  # a wider step to verify them is no longer cheap


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 is greedy; the neutral value of each other field switches it off."""

    SEEDS: ClassVar = 2**64  # so many are counted through

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    max_tokens: int = 1024
    seed: int | None = None
    lookup: int | Literal["auto"] = 0  # how many ids to draft by looking them up in the text; changes no text

    def __post_init__(self) -> None:
        drafted = 0 if self.lookup == "auto" else self.lookup
        # Beyond these bounds the arithmetic of float32 breaks, and no text is better for it.
        checks = (
            (
                "temperature",
                self.temperature,
                self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= 100,
                "0, or 0.001-100",
            ),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or above"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 100, "from -100 to 100"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 100, "from -100 to 100"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or above"),
            ("seed", self.seed or 0, -(2**63) <= (self.seed or 0) < 2**64, "a 64-bit number"),
            ("lookup", drafted, 0 <= drafted <= MAX_LOOKUP, f"auto, or from 0 to {MAX_LOOKUP}"),
        )
        for name, value, fits, wanted in checks:
            if not fits or not -math.inf < value < math.inf:
                raise ValueError(f"{name} must be {wanted}, not {value}")

    def under(self, **given: Any) -> SamplingParams:
        """These values where none is given; `ValueError` names one that is out of bounds."""
        return replace(self, **given)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


# The only list of the parameters, by kind; those of the distribution change which token is likely to be chosen.
PARAMETERS: Mapping[str, type] = MappingProxyType(
    {f.name: int if str(f.type).startswith("int") else float for f in fields(SamplingParams)}
)
DISTRIBUTION = tuple(name for name in PARAMETERS if name not in ("max_tokens", "seed", "lookup"))


def penalize(logits: Tensor, seen: Tensor, counts: Tensor, params: SamplingParams) -> Tensor:
    """Lower the logits of tokens that occurred.

    logits [vocab]; seen [vocab] bool: in the prompt or the reply; counts [vocab]: occurrences in the reply.
    The repetition penalty divides positive logits and multiplies negative ones (CTRL, arXiv 1909.05858); frequency
    and presence penalty are subtracted (OpenAI's definition).
    """
    if params.repetition_penalty != 1:
        factor = params.repetition_penalty
        logits = logits.where(~seen, (logits / factor).where(logits > 0, logits * factor))
    if params.frequency_penalty or params.presence_penalty:
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return logits


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The ids that may come next, ascending, and their logits by temperature. logits [vocab].

    Temperature, then top-k, top-p and min-p, in that order. They are few: to sort a whole vocabulary and to draw noise
    for it took 13 ms, as long as a small model takes for a token.
    """
    import torch

    logits = logits.float() / params.temperature
    ids = torch.arange(len(logits), device=logits.device)
    if 0 < params.top_k < len(logits):
        ids = (logits >= logits.topk(params.top_k).values[-1]).nonzero()[:, 0]
        logits = logits[ids]
    if params.top_p < 1:
        probs = logits.softmax(-1)
        # All that are less likely do not add up to half of what top-p leaves out: they need not be sorted.
        likely = (probs >= (1 - params.top_p) / 2 / len(probs)).nonzero()[:, 0]
        order = likely[logits[likely].argsort(descending=True, stable=True)]
        # A token stays while the mass before it is below top_p; the first one even where float32 rounds top_p to 0.
        stays = probs[order].cumsum(-1) - probs[order] < params.top_p
        stays[0] = True
        kept = order[stays].sort().values
        ids, logits = ids[kept], logits[kept]
    if params.min_p > 0:
        probs = logits.softmax(-1)
        kept = (probs >= params.min_p * probs.max()).nonzero()[:, 0]
        ids, logits = ids[kept], logits[kept]
    return ids, logits


def allowed(logits: Tensor, params: SamplingParams) -> Tensor:
    """The same as `candidates`, for a card: logits [vocab] by temperature, -inf of ids that may not come.

    It sorts a whole vocabulary in less time than the host needs to hear how many are left.
    """
    import torch

    logits = logits.float() / params.temperature
    if 0 < params.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -math.inf)
    if params.top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True, stable=True)
        left_out = probs.cumsum(-1, dtype=torch.float64) - probs >= params.top_p
        left_out[0] = False
        logits = logits.masked_fill(left_out.scatter(0, order, left_out), -math.inf)
    if params.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < params.min_p * probs.max(), -math.inf)
    return logits


def draw(logits: Tensor, params: SamplingParams, generator: torch.Generator | None = None) -> Tensor:
    """Choose the next id from penalized logits [vocab] where they lie: int64 [], and nothing is waited for."""
    if params.greedy:
        return logits.float().argmax()
    scores = allowed(logits, params)
    noise = scores.new_empty(scores.shape).exponential_(generator=generator)
    return (scores - noise.log()).argmax()  # the race of `sample`, in logarithms: -inf never wins


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator | None = None) -> int:
    """Choose the next id from penalized logits [vocab]."""
    if logits.is_cuda:
        return int(draw(logits, params, generator))
    if params.greedy:
        # NumPy takes 0.02 ms for a vocabulary; PyTorch's takes 0.25, and threads away from the native kernels.
        return int(logits.float().numpy(force=True).argmax())
    ids, kept = candidates(logits, params)
    probs = kept.softmax(-1)
    # The exponential race: argmax(p / Exp(1)) is a draw from p, and needs one pass where multinomial needs two.
    noise = probs.new_empty(probs.shape).exponential_(generator=generator)
    return int(ids[(probs / noise).argmax()])
