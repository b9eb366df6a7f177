"""Subclasses of Lightning's own precision plugins for the Trainer, with the same names, that mix in ``InStep``.

The module is private because LightningCLI looks up a bare ``--trainer.plugins=MixedPrecision`` among public subclasses,
and has to find Lightning's.
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


# The names are the same because checkpoints store a plugin's state under the name of its class.
_TWINS = {
    plugins.Precision: Precision,
    plugins.HalfPrecision: HalfPrecision,
    plugins.MixedPrecision: MixedPrecision,
}


def fuse_scaling_and_clipping(plugin: Any) -> None:
    """Change the class of a plugin to the subclass above, if it is exactly one of Lightning's. The object stays the
    same."""
    if type(plugin) in _TWINS:
        plugin.__class__ = _TWINS[type(plugin)]
