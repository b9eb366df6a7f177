"""The way of one parameter from ``optimizer.step()`` to the kernel, as docs/kernels.md shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn import Parameter

import lowbit_lightning
from lowbit_lightning import optim

PACKAGE = Path(lowbit_lightning.__file__).parent
# Values, which are asked wherever they are; and the doors, through which tensors come in and go out.
ASKED = (
    *("optim/settings", "optim/options", "optim/partitions", "optim/family", "state/form", "state/shards"),
    *("kernels/formats", "kernels/rules", "kernels/arguments", "kernels/sources", "state/pages/entries"),
)
END = "kernels/cpu/step.optimizer_step"


def stations(step: Callable[[], Any]) -> list[str]:
    """Every function that is called from another file, in the order of the calls, up to the kernel."""
    found: list[str] = []

    def file_of(frame: FrameType | None) -> str:
        """Of the nearest frame that is not asked."""
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                file = str(path.relative_to(PACKAGE).with_suffix(""))
                if not file.startswith(ASKED):
                    return file
            frame = frame.f_back
        return ""

    def profile(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or END in found or not path.is_relative_to(PACKAGE):
            return
        file = str(path.relative_to(PACKAGE).with_suffix(""))
        if not file.startswith(ASKED) and file != file_of(frame.f_back):
            found.append(f"{file}.{frame.f_code.co_name}")

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def files(trace: list[str]) -> list[str]:
    """Of each stretch of the trace."""
    names = [name.rpartition(".")[0] for name in trace]
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


NEW = [
    "optim/base.step",
    "optim/plan.run",
    "state/store.give",
    "state/pagers.place",
    "state/blocks.filled",
    "optim/factors.factors",
    "kernels/step.optimizer_step",
    "kernels/dispatch.run",
    END,
]
"""As docs/kernels.md lists it."""


def test_no_file_is_entered_twice_on_the_way_to_the_kernel() -> None:
    p = Parameter(torch.randn(64, 300))
    for bits in (8, 32):  # what is compiled and loaded by the first call
        other = Parameter(torch.zeros(64, 300))
        other.grad = torch.zeros(64, 300)
        optim.AdamW([other], bits=bits).step()
    optimizer = optim.AdamW([p])
    optimizer.page_statistics()  # makes the store
    assert optimizer._plans is optimizer._plans  # and what it keeps
    for number, changes in enumerate(({}, {}, {"bits": 32}, {"bits": 8})):
        optimizer.param_groups[0].update(changes)
        p.grad = torch.randn(p.shape)
        trace = stations(optimizer.step)
        if changes:  # which quantises: a kernel of its own
            trace = [name for name in trace if not name.startswith("kernels/") or name == END]
        found = files(trace)
        assert len(found) == len(set(found)), found
        assert trace[-1] == END
        if number == 0:
            assert list(dict.fromkeys(trace)) == [*NEW[:5], "state/blocks.convert", *NEW[5:]]
