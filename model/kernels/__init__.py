"""A choice: how a matrix or an expert is held and multiplied. `choose` takes the first kernel that is right here."""

from .base import GluExpertKernel, LinearKernel, Packed, Rows
from .linear import PackedLinear
from .registry import (
    ACTIVATIONS,
    KERNELS,
    card_facts,
    choose,
    experts_of,
    fault,
    has_triton,
    kernel_facts,
    probe,
    streamed_experts_of,
)
from .torch_glu import FloatGlu

__all__ = [
    "ACTIVATIONS",
    "KERNELS",
    "FloatGlu",
    "GluExpertKernel",
    "LinearKernel",
    "Packed",
    "PackedLinear",
    "Rows",
    "card_facts",
    "choose",
    "experts_of",
    "fault",
    "has_triton",
    "kernel_facts",
    "probe",
    "streamed_experts_of",
]
