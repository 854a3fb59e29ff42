"""A choice: where and how the experts' weights live."""

from .resident import ResidentExperts

__all__ = ["ResidentExperts"]
