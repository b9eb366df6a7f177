"""Layers that are slower in int8 than in high precision, found after the first step of a run: ``swap="faster"``.

The first step runs in int8 as a whole, so that all layers know the sizes of their inputs. Then ``layers.speed`` times
each shape of layer once, and the slower ones become plain. An attention and its output projection are one layer here,
because a plain attention reads the weight of the latter itself.

The answer must not change between runs that are compared: times are kept beside the compiled kernels, rank 0 measures
for all ranks, and a checkpoint holds the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn

from lowbit_lightning.layers import Int8MultiheadAttention, speed
from lowbit_lightning.layers.int8 import Int8Layer, Products, can_be_released, release
from lowbit_lightning.layers.select import Report, stacked
from lowbit_lightning.layers.shapes import Shape, shape_of
from lowbit_lightning.layers.timing import agreed

UNTIMED = "in int8 without having been timed, because they did not run in the first step or run inside torch.compile"
FEW = 0.5
"""A warning says so if less of the multiplications than this run in int8."""


@dataclass
class Slower:
    """``layers``: names of layers -> why they stay in high precision. ``gains``: what a report says of each shape."""

    known: bool = False
    layers: dict[str, str] = field(default_factory=dict)
    gains: tuple[str, ...] = ()

    def find(self, module: nn.Module, report: Report) -> None:
        """Time the swapped layers that have trained. All ranks call it together and get the same answer.

        Warns if most of the model is faster in high precision.
        """
        self.known = True
        swapped = {n: m for n, m in module.named_modules() if n in report.swapped and isinstance(m, Int8Layer)}
        int8 = {name: m for name, m in swapped.items() if m.products.int8}
        owned = {_out(name): name for name, m in int8.items() if isinstance(m, Int8MultiheadAttention)}
        timed = {name: m for name, m in int8.items() if name not in owned}
        if not timed:
            return
        shapes = {name: shape_of(m) for name, m in timed.items()}
        self.layers, self.gains, few = agreed(lambda: _timed(timed, shapes))
        self.layers |= {out: self.layers[name] for out, name in owned.items() if name in self.layers and out in swapped}
        if few:
            rank_zero_warn(few)

    def apply(self, module: nn.Module, report: Report) -> Report:
        """Make the slower layers plain, and say so."""
        if not self.known:
            return report
        for name, layer in module.named_modules():
            if name in self.layers and isinstance(layer, Int8Layer):
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


def _out(attention: str) -> str:
    """The name of its output projection."""
    return f"{attention}.out_proj".lstrip(".")


def _timed(
    named: Mapping[str, Int8Layer], shapes: Mapping[str, Shape | None]
) -> tuple[dict[str, str], tuple[str, ...], str]:
    """``Slower.layers`` and ``gains``, and a warning or ""."""
    layers: dict[str, str] = {}
    gains = []
    all_of_them = in_int8 = 0
    for shape in dict.fromkeys(shapes.values()):
        names = [name for name, own in shapes.items() if own == shape]
        if shape is None:
            gains.append(f"{stacked(names)}: {UNTIMED}")
            continue
        times = speed.times(shape, named[names[0]].weight.device)
        all_of_them += len(names) * shape.multiplications
        if times.pays:
            in_int8 += len(names) * shape.multiplications
            gains.append(f"{stacked(names)} ({shape}): {times}")
        else:
            layers |= dict.fromkeys(names, f"slower in int8 on this device ({shape}: {times}; swap='all' takes it too)")
    few = in_int8 < FEW * all_of_them
    return layers, tuple(gains), _warning(named, layers, in_int8 / all_of_them) if few else ""


def _warning(named: Mapping[str, Int8Layer], layers: Mapping[str, str], share: float) -> str:
    device = next(iter(named.values())).weight.device.type
    return (
        f"int8 products are not faster on this {device} device for {len(layers)} of {len(named)} layers at the sizes "
        f"that this run sees; these go on in high precision, and {100 * share:.0f} % of the multiplications run in "
        "int8. Larger batches may be faster in int8. Otherwise precision='32-true' or 'bf16-mixed' is at least as "
        "fast. Int8MixedPrecision(swap='all') keeps all layers in int8, which saves memory for activations. The report "
        "(trainer.precision_plugin.report) has the times of each layer"
    )
