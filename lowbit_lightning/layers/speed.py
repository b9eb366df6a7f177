"""Which layers are faster in int8 on this device: measured, by the sizes that they have seen.

A layer that has trained once knows the sizes of its inputs (``layers.seen``). Its forward and backward are then timed
in int8 and in high precision: in the dtypes that it computed in, with the gradients that it needed, at those sizes
(``layers.shapes``). The times are kept for the next run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from lowbit_lightning.kernels.compile import processor, sources_digest
from lowbit_lightning.kernels.dispatch import uncounted
from lowbit_lightning.layers.shapes import DTYPES, Shape
from lowbit_lightning.layers.timing import remembered, shortest

ROUNDS, SECONDS = 6, 0.4
"""Rounds, and seconds after which none begins."""

GAIN = 1.05
"""int8 must be faster by this factor, so that noise does not decide."""


class Times(NamedTuple):
    """Seconds for the forward and backward of a layer, in int8 and in high precision."""

    int8: float
    high: float

    @property
    def pays(self) -> bool:
        return self.high > GAIN * self.int8

    def __str__(self) -> str:
        return f"{self.high / self.int8:.2f} times as fast in int8"


@cache
def times(shape: Any, device: torch.device) -> Times:
    """The times of a shape, kept from an earlier run or measured now."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    described = machine, sources_digest(), repr(shape)
    return Times(*remembered("speed", *described, measure=lambda: measure(shape, device)))


def measure(shape: Shape, device: torch.device) -> Times:
    """``times``, measured now. ``kernels.calls`` does not see it."""
    with uncounted():
        return Times(*shortest([runner(shape, device, high) for high in (False, True)], device, ROUNDS, SECONDS))


def runner(shape: Shape, device: torch.device, high: bool) -> Callable[[], None]:
    """That of the shape, under autocast if the layer trained under it: its plain form casts the weight each time."""
    terms, run = shape.terms, shape.runner(device, high)
    autocast: dict[str, Any] = {"dtype": DTYPES[terms.dtype], "enabled": terms.dtype != terms.weight}

    def once() -> None:
        with torch.enable_grad(), torch.autocast(device.type, **autocast, cache_enabled=False):
            run()

    return once
