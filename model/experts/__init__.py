"""A choice: where the experts' weights live."""

from .hybrid import Bus, Crossing, HybridExperts
from .packed import PackedExperts, packed_expert
from .resident import ResidentExperts

__all__ = ["Bus", "Crossing", "HybridExperts", "PackedExperts", "ResidentExperts", "packed_expert"]
