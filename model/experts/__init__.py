"""A choice: where the experts' weights live."""

from .hybrid import Bus, HybridExperts
from .packed import PackedExperts, packed_expert
from .resident import ResidentExperts

__all__ = ["Bus", "HybridExperts", "PackedExperts", "ResidentExperts", "packed_expert"]
