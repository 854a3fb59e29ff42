"""What streaming did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass
class Counters:
    """Experts asked for, bytes read for them, and the seconds that computing stood still."""

    hits: int = 0  # experts found in the cache
    misses: int = 0
    bytes_read: int = 0  # as the files were read: whole blocks at both ends of a slice
    waited_s: float = 0.0  # for bytes that were not there yet
    packed_s: float = 0.0  # bringing what was read into the form that is computed with

    def since(self, earlier: Counters) -> Counters:
        """What was added after `earlier`, a copy made then."""
        before = asdict(earlier)
        return Counters(**{name: value - before[name] for name, value in asdict(self).items()})

    def copy(self) -> Counters:
        """The numbers of this moment."""
        return replace(self)

    def summary(self) -> str:
        """In one line."""
        asked = self.hits + self.misses
        share = f"{self.hits / asked:.0%}" if asked else "none"
        packed = f", packed for {self.packed_s:.2f} s" if self.packed_s >= 0.005 else ""
        return (
            f"experts: {asked} used, {share} from the cache, {self.bytes_read / 1e9:.2f} GB read, "
            f"waited {self.waited_s:.2f} s{packed}"
        )
