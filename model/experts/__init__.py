"""A choice: where the experts' weights live."""

from .hybrid import Bus, HybridExperts, LongSteps
from .packed import PackedExperts, packed_expert
from .resident import ResidentExperts

__all__ = ["Bus", "HybridExperts", "LongSteps", "PackedExperts", "ResidentExperts", "packed_expert"]
