"""What the planner returns: ``Plan`` and ``Advice``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CATEGORIES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "states": "optimizer states",
    "buffers": "buffers",
    "gathered": "gathered parameters (FSDP2)",
    "reduction": "gradients in communication",
    "activations": "activations",
}


@dataclass(frozen=True)
class Advice:
    """A change of the plan: ``saves`` bytes per device; ``fits``: it alone is enough. ``cost`` says what it takes."""

    change: str
    cost: str
    saves: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Bytes of one training run on the device that holds most: the first rank.

    Attributes:
        parameters, gradients, states, buffers: exact.
        gathered: FSDP2's unsharded copies of parameters. reduction: copies of gradients for communication.
        activations: tensors that forward and backward hold at their peak, beyond the gradients; None without a batch.
        paged_out: bytes of optimizer states in "host memory" or on "disk"; not part of ``total``.
        state_parts: ``states`` by kind; "pages" is near memory of paged states: of resident ones, and the ring.
        communication: bytes by collective in an optimizer step, of the whole tensor: what a rank hands over to be
            reduced, or receives when it is gathered.
        margin: a share of the total, for memory that the allocator keeps beside the tensors.
        settings: what was planned for, and what gave the ``loss``.
    """

    parameters: int
    gradients: int
    states: int
    buffers: int
    gathered: int
    reduction: int
    activations: int | None
    paged_out: dict[str, int]
    state_parts: dict[str, int]
    communication: dict[str, int]
    settings: dict[str, Any]
    margin: float
    _advise: Callable[[int], list[Advice]] = field(repr=False, compare=False)

    @property
    def total(self) -> int:
        """The sum of all that is known: without a batch, of all but activations."""
        return sum(getattr(self, name) or 0 for name in CATEGORIES)

    @property
    def needed(self) -> int:
        """``total``, and the allocator's margin."""
        return self.total + int(self.total * self.margin)

    def fits(self, memory: int) -> bool:
        """Whether ``needed`` is at most ``memory`` bytes."""
        return self.needed <= memory

    def advice(self, memory: int) -> list[Advice]:
        """The changes that save memory, by bytes saved over cost, each planned separately. Empty if the plan fits."""
        return [] if self.fits(memory) else self._advise(memory)

    def to_dict(self) -> dict[str, Any]:
        """The plan as a dict for JSON."""
        own = {name: getattr(self, name) for name in CATEGORIES}
        rest = {name: dict(getattr(self, name)) for name in ("paged_out", "state_parts", "communication", "settings")}
        return {**own, "total": self.total, "needed": self.needed, **rest}

    def table(self, memory: int | None = None) -> str:
        """Plain text; with ``memory``, whether that fits, and the advice."""
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        lines = [settings, "", _line("bytes per device", "", "")]
        for name, title in CATEGORIES.items():
            value = getattr(self, name)
            if value is None:
                lines.append(_line(title, "unknown", "give a batch"))
            elif value:
                lines.append(_line(title, f"{value:,}", readable(value)))
            if name == "states" and len(self.state_parts) > 1:
                lines += [_line(f"  {kind}", f"{size:,}", readable(size)) for kind, size in self.state_parts.items()]
        lines.append(_line("total", f"{self.total:,}", readable(self.total)))
        if self.margin:
            title = f"with the allocator's margin, {self.margin:.0%}"
            lines.append(_line(title, f"{self.needed:,}", readable(self.needed)))
        lines += [_line(f"paged out to {place}", f"{size:,}", readable(size)) for place, size in self.paged_out.items()]
        if self.communication:
            lines += ["", _line("communication in a step", "", "")]
            lines += [_line(name, f"{size:,}", readable(size)) for name, size in self.communication.items()]
        if memory is not None:
            lines += ["", *self._verdict(memory)]
        return "\n".join(line.rstrip() for line in lines)

    def _verdict(self, memory: int) -> list[str]:
        if self.fits(memory):
            known = "" if self.activations is not None else " for activations, which are unknown"
            return [f"fits in {readable(memory)}: {readable(memory - self.needed)} are left{known}"]
        over = readable(self.needed - memory)
        lines = [f"does not fit in {readable(memory)}: {over} too much. What to change first:"]
        for advice in self.advice(memory):
            enough = "; enough by itself" if advice.fits else ""
            lines.append(f"  {advice.change}: saves {readable(advice.saves)} ({advice.cost}){enough}")
        return lines if len(lines) > 1 else [*lines, "  nothing that this planner knows of: a smaller model or batch"]


def _line(title: str, number: str, text: str) -> str:
    return f"{title:36}{number:>20}  {text:>12}"


def readable(size: int) -> str:
    """'1.50 GiB'."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
