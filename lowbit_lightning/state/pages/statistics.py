"""Statistics of paging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass
class PageStatistics:
    """Counters of a pager, or of all pagers of an optimizer, since the first step.

    ``far_bytes``: size of the slab. ``resident_bytes``: size of the states that stay in near memory. ``near_bytes``:
    size of near memory, which holds the resident states and the ring, without scales and step counts. ``bytes_in``,
    ``bytes_out``: bytes copied. ``waits``: how often kernels waited for a copy. ``stalls``, ``stall_seconds``: how
    often and how long the host waited for that. On a GPU the stream waits, which the host does not notice
    (``stalls_on_host`` is False). ``step_seconds``: the host's time inside steps.
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
        """The share of the steps' time in which the host did not wait for a copy; None if it is not known."""
        if not self.stalls_on_host or not self.step_seconds:
            return None
        return max(0.0, 1.0 - self.stall_seconds / self.step_seconds)

    def go_on(self, before: PageStatistics) -> None:
        """Add the counts of the pager that this one replaced."""
        for f in fields(self):
            if f.name not in ("far_bytes", "resident_bytes", "near_bytes", "stalls_on_host"):
                setattr(self, f.name, getattr(self, f.name) + getattr(before, f.name))

    @classmethod
    def total(cls, parts: Iterable[PageStatistics]) -> PageStatistics:
        """The sum of several. ``stalls_on_host`` is True if it is True for all of them."""
        parts = list(parts)
        sums = {f.name: sum(getattr(p, f.name) for p in parts) for f in fields(cls) if f.name != "stalls_on_host"}
        return cls(stalls_on_host=all(p.stalls_on_host for p in parts), **sums)
