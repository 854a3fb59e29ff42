"""Experts that come when they are needed: their bytes travel in the background into a cache of a fixed size."""

from .counters import Counters
from .host import HostSource
from .reader import DiskSource
from .slots import make_slots
from .source import Source, slot_size
from .store import ExpertStore, Pack

__all__ = ["Counters", "DiskSource", "ExpertStore", "HostSource", "Pack", "Source", "make_slots", "slot_size"]
