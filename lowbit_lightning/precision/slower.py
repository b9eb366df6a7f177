"""Convolutions and experts that are slower in int8 than in high precision, found after the first step of a run:
``swap="faster"``.

The first step runs in int8 as a whole, so that all layers know the sizes of their inputs. Then ``layers.speed`` times
each kind of convolution and of experts once, and the slower ones become plain. Linear layers are not timed.

The answer must not change between runs that are compared: times are kept beside the compiled kernels, rank 0 measures
for all ranks, and a checkpoint holds the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lowbit_lightning.layers import speed
from lowbit_lightning.layers.conv import Int8Conv
from lowbit_lightning.layers.int8 import Int8Layer, Products, can_be_released, release
from lowbit_lightning.layers.moe import Int8ExpertsForm
from lowbit_lightning.layers.select import Report, stacked
from lowbit_lightning.layers.speed import Shape, shape_of
from lowbit_lightning.layers.timing import agreed

_TIMED = (Int8Conv, Int8ExpertsForm)


@dataclass
class Slower:
    """``layers``: names of layers -> why they stay in high precision. ``gains``: what a report says of each kind."""

    known: bool = False
    layers: dict[str, str] = field(default_factory=dict)
    gains: tuple[str, ...] = ()

    def find(self, module: nn.Module) -> None:
        """Time the convolutions and experts that have trained. All ranks call it together and get the same answer."""
        named = {name: m for name, m in module.named_modules() if isinstance(m, _TIMED) and m.products.int8}
        self.known = True
        if not named:
            return
        shapes = {name: shape for name, m in named.items() if (shape := shape_of(m)) is not None}
        self.layers, self.gains = agreed(lambda: _timed(named, shapes))

    def apply(self, module: nn.Module, report: Report) -> Report:
        """Make the slower layers plain, and say so."""
        if not self.known:
            return report
        for name, layer in module.named_modules():
            if name in self.layers and isinstance(layer, _TIMED):
                if can_be_released(layer):
                    release(layer)
                else:  # fully_shard has derived its class
                    layer.products = Products("high", "high", "high")
        return replace(
            report,
            swapped=tuple(name for name in report.swapped if name not in self.layers),
            skipped={**report.skipped, **self.layers},
            notes=tuple(dict.fromkeys((*report.notes, *self.gains))),
        )

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"layers": dict(self.layers), "gains": list(self.gains)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Slower:
        """The inverse of ``state``."""
        return cls(True, dict(state["layers"]), tuple(state["gains"]))


def _timed(named: Mapping[str, Int8Layer], shapes: Mapping[str, Shape]) -> tuple[dict[str, str], tuple[str, ...]]:
    layers: dict[str, str] = {}
    gains = []
    for shape in dict.fromkeys(shapes.values()):
        names = [name for name, own in shapes.items() if own == shape]
        times = speed.times(shape, named[names[0]].weight.device)
        if times.pays:
            gains.append(f"{stacked(names)} ({shape}): {times}")
        else:
            layers |= dict.fromkeys(names, f"slower in int8 on this device ({shape}: {times}; swap='all' takes it too)")
    return layers, tuple(gains)
