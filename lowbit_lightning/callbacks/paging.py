"""Statistics of paging for ``LowBitMonitor``: numbers to log, and a line for the end of a run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.memory.result import readable
from lowbit_lightning.optim import LowBitOptimizer
from lowbit_lightning.state.pages import PageStatistics


def low_bit(optimizers: Iterable[Optimizer]) -> list[LowBitOptimizer]:
    """The optimizers of this package; under DeepSpeed each is inside one of DeepSpeed's."""
    inner = [o if isinstance(o, LowBitOptimizer) else getattr(o, "optimizer", o) for o in optimizers]
    return [o for o in inner if isinstance(o, LowBitOptimizer)]


def statistics(optimizers: Iterable[Optimizer]) -> PageStatistics | None:
    """The statistics of all pagers on this rank since they were made; None if nothing is paged."""
    found = [o.page_statistics() for o in low_bit(optimizers)]
    parts = [part for part in found if part is not None]
    return PageStatistics.total(parts) if parts else None


def metrics(optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Means over all steps so far, by the names they are logged under; empty if nothing is paged."""
    total = statistics(optimizers)
    if total is None:
        return {}
    steps = max(1, total.steps)
    values = {
        "resident_share": total.resident_share,
        "bytes_in": total.bytes_in / steps,
        "bytes_out": total.bytes_out / steps,
    }
    if total.overlap is not None:
        values |= {"stalls": total.stalls / steps, "stall_seconds": total.stall_seconds / steps}
        values["overlap"] = total.overlap
    return {f"pages/{name}": torch.tensor(value) for name, value in values.items()}


def report(optimizers: Iterable[Optimizer]) -> str | None:
    """A line about the whole run; None if nothing is paged."""
    total = statistics(optimizers)
    if total is None or not total.steps:
        return None
    text = (
        f"paged optimizer states: {readable(total.far_bytes)}, {100 * total.resident_share:.0f} % of them resident; "
        f"{readable(total.bytes_in)} in and {readable(total.bytes_out)} out in {total.steps} steps"
    )
    if total.overlap is not None:
        waited = f"{total.stall_seconds:.1f} of {total.step_seconds:.1f} s"
        text += f", which waited for copies {total.stalls} times, {waited} (overlap {100 * total.overlap:.0f} %)"
    return text
