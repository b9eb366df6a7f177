"""What a pager has done so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass
class PageStatistics:
    """Counters of a pager, or of all pagers of an optimizer, since the first step.

    ``far_bytes``: of the slab. ``resident_bytes``: of states that stay near. ``near_bytes``: of near memory, which are
    the resident states and the ring; scales and step counts are not counted. ``bytes_in``, ``bytes_out``: that
    travelled. ``waits``: how often kernels had to wait for a copy. ``stalls``, ``stall_seconds``: how often, and how
    long, that made the host wait; on a GPU its stream waits, and the host does not know (``stalls_on_host`` is False).
    ``step_seconds``: of the host, inside steps.
    """

    far_bytes: int = 0
    resident_bytes: int = 0
    near_bytes: int = 0
    stalls_on_host: bool = True
    steps: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    waits: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    step_seconds: float = 0.0

    @property
    def resident_share(self) -> float:
        """The share of the paged states that stays near."""
        return self.resident_bytes / self.far_bytes if self.far_bytes else 0.0

    @property
    def overlap(self) -> float | None:
        """The share of the steps' time in which the host did not wait for a copy; None where it cannot know."""
        if not self.stalls_on_host or not self.step_seconds:
            return None
        return max(0.0, 1.0 - self.stall_seconds / self.step_seconds)

    def go_on(self, before: PageStatistics) -> None:
        """Count on from another pager's, which this one's took the place of."""
        for f in fields(self):
            if f.name not in ("far_bytes", "resident_bytes", "near_bytes", "stalls_on_host"):
                setattr(self, f.name, getattr(self, f.name) + getattr(before, f.name))

    @classmethod
    def total(cls, parts: Iterable[PageStatistics]) -> PageStatistics:
        """The sum of several; the host's stalls count where all of them are on the host."""
        parts = list(parts)
        sums = {f.name: sum(getattr(p, f.name) for p in parts) for f in fields(cls) if f.name != "stalls_on_host"}
        return cls(stalls_on_host=all(p.stalls_on_host for p in parts), **sums)
