"""A choice: where and how the experts' weights live."""

from .kernel import Fetch, Kernel, Packed, mix, packed_expert
from .matrices import MatricesKernel
from .packed import PackedExperts
from .resident import FloatKernel, ResidentExperts

__all__ = [
    "Fetch",
    "FloatKernel",
    "Kernel",
    "MatricesKernel",
    "Packed",
    "PackedExperts",
    "ResidentExperts",
    "mix",
    "packed_expert",
]
