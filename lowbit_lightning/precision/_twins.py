"""Lightning's own precision plugins for the Trainer, as subclasses of the same names that mix in ``InStep``.

The module's name is private: LightningCLI looks a bare ``--trainer.plugins=MixedPrecision`` up among public subclasses,
and that name remains Lightning's.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import plugins

from lowbit_lightning.precision.in_step import InStep


class Precision(InStep, plugins.Precision):
    __doc__ = plugins.Precision.__doc__


class HalfPrecision(InStep, plugins.HalfPrecision):
    __doc__ = plugins.HalfPrecision.__doc__


class MixedPrecision(InStep, plugins.MixedPrecision):
    __doc__ = plugins.MixedPrecision.__doc__


# By the same names: checkpoints hold a plugin's state under that of its class.
_TWINS = {
    plugins.Precision: Precision,
    plugins.HalfPrecision: HalfPrecision,
    plugins.MixedPrecision: MixedPrecision,
}


def fuse_scaling_and_clipping(plugin: Any) -> None:
    """Make a plugin that is exactly one of Lightning's the subclass above; the same object, whoever made it."""
    if type(plugin) in _TWINS:
        plugin.__class__ = _TWINS[type(plugin)]
