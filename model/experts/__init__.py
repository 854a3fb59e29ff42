"""A choice: where the experts' weights live."""

from .packed import PackedExperts, packed_expert
from .resident import ResidentExperts

__all__ = ["PackedExperts", "ResidentExperts", "packed_expert"]
