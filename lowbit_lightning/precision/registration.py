"""Registration of the string ``precision="int8-mixed"``.

Lightning has no registry for precision strings, so its connectors are wrapped. The wrapped connector of the Trainer
also moves unscaling and clipping into the step (``in_step.py``). The string is added to the annotations of the Trainer
and Fabric, because LightningCLI reads the values of ``--trainer.precision`` from them.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Union, get_args

import lightning
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.strategies import StrategyRegistry

from lowbit_lightning.precision._twins import fuse_scaling_and_clipping
from lowbit_lightning.precision.accounting import patch_accounting
from lowbit_lightning.precision.in_step import allow_clipping
from lowbit_lightning.precision.int8 import (
    NAME,
    DeepSpeedInt8MixedPrecision,
    FabricInt8MixedPrecision,
    Int8Mixed,
    Int8MixedPrecision,
    fit_to,
)
from lowbit_lightning.precision.low_bit_weights import LowBitWeights, attach
from lowbit_lightning.precision.wrapping import wrap_once


class PrecisionNotApplied(RuntimeError):
    """Raised if ``precision="int8-mixed"`` was asked for, but Lightning would run something else."""


def register() -> None:
    """Make ``lightning.Trainer`` and ``lightning.Fabric`` accept ``precision="int8-mixed"``, and let the steps of our
    optimizers unscale, clip and skip under the Trainer. Idempotent."""
    from lightning.fabric.connector import _Connector
    from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    if NAME not in get_args(_PRECISION_INPUT_STR):
        _wrap(_AcceleratorConnector, Int8MixedPrecision, "precision_plugin")
        _wrap(_Connector, FabricInt8MixedPrecision, "precision")
        for reader in (lightning.Trainer, lightning.Fabric):
            _annotate(reader)
    allow_clipping()
    patch_accounting()


def _wrap(connector: type, plugin: type[Any], attribute: str) -> None:
    signature = inspect.signature(connector.__init__)  # type: ignore[misc]
    missing = {"precision", "plugins", "strategy"} - set(signature.parameters)
    if missing:
        rank_zero_warn(
            f"precision={NAME!r} can't be registered with Lightning {lightning.__version__}: {connector.__name__} no "
            f"longer takes {sorted(missing)}; pass plugins=[{plugin.__name__}()] instead"
        )
        return

    def connect(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        wanted = _precision(connector, bound.arguments.get("precision")) == NAME
        weights, plugins = _without_weights(_listed(bound.arguments.get("plugins")))
        if weights is not None:
            bound.arguments["plugins"] = plugins
        _check_plugins(plugins, plugin, wanted)
        if wanted:
            named = plugin()
            named.by_name = True
            plugins = [*plugins, named]
            bound.arguments.update(precision=None, plugins=plugins)
        for given in plugins:
            if isinstance(given, Int8MixedPrecision):
                fit_to(given, engine=_has_engine(bound.arguments.get("strategy")))
        with _without_variable("LT_PRECISION" if wanted else None):
            original(*bound.args, **bound.kwargs)
        in_use = getattr(self, attribute, None)
        _check_result(self.strategy, in_use, plugin, wanted, weights)
        fuse_scaling_and_clipping(in_use)
        if isinstance(in_use, Int8Mixed):
            in_use.device_type = type(self.accelerator).__name__.removesuffix("Accelerator").lower()
        if weights is not None:
            attach(weights, in_use, self.strategy)

    wrap_once(connector, "__init__", connect)


def _annotate(reader: type) -> None:
    """Add the string to the values that the annotation of ``precision`` allows."""
    annotations = inspect.unwrap(reader.__init__).__annotations__  # type: ignore[misc]
    allowed = annotations.get("precision")
    if allowed is not None and Literal[NAME] not in get_args(allowed):
        annotations["precision"] = Union[allowed, Literal[NAME]]  # noqa: UP007 (of values, not of written types)


def _precision(connector: Any, argument: Any) -> Any:
    """The precision that was asked for. In Fabric the variable LT_PRECISION overrides the argument; the Trainer has
    already read its variable."""
    from_env = getattr(connector, "_argument_from_env", None)
    return argument if from_env is None else from_env("precision", argument, default=None)


def _listed(plugins: Any) -> list[Any]:
    if plugins is None:
        return []
    return list(plugins) if isinstance(plugins, Iterable) else [plugins]


def _has_engine(strategy: Any) -> bool:
    """Whether a strategy, or the strategy of that name, needs a precision plugin for an engine that runs the step."""
    known = isinstance(strategy, str) and strategy in StrategyRegistry
    kind = StrategyRegistry[strategy]["strategy"] if known else strategy
    return getattr(kind, "runs_int8_in_engine", False)


@contextmanager
def _without_variable(name: str | None) -> Iterator[None]:
    value = None if name is None else os.environ.pop(name, None)
    try:
        yield
    finally:
        if name is not None and value is not None:
            os.environ[name] = value


def _check_plugins(plugins: list[Any], plugin: type[Any], wanted: bool) -> None:
    for given in plugins:
        if wanted and isinstance(given, FabricPrecision):
            raise ValueError(f"got both precision={NAME!r} and plugins=[{type(given).__name__}(...)]; choose one")
        if isinstance(given, Int8Mixed) and not isinstance(given, plugin):
            raise TypeError(f"plugins=[{type(given).__name__}(...)] doesn't fit here; use {plugin.__name__}(...)")


def _without_weights(plugins: list[Any]) -> tuple[LowBitWeights | None, list[Any]]:
    found = [given for given in plugins if isinstance(given, LowBitWeights)]
    if len(found) > 1:
        raise ValueError(f"plugins has {len(found)} LowBitWeights; give one, with overrides= for some of the layers")
    return (found[0] if found else None), [given for given in plugins if not isinstance(given, LowBitWeights)]


def _check_result(
    strategy: Any, in_use: Any, plugin: type[Any], wanted: bool, weights: LowBitWeights | None = None
) -> None:
    flat = ("FSDPStrategy", "XLAStrategy", "SingleDeviceXLAStrategy", "XLAFSDPStrategy")
    bases = {base.__name__ for base in type(strategy).__mro__}
    theirs = not bases.isdisjoint(("DeepSpeedStrategy", *flat))
    if weights is not None and not bases.isdisjoint(flat):
        raise PrecisionNotApplied(
            f"LowBitWeights doesn't work with {type(strategy).__name__}, which flattens or casts parameters; use "
            "strategy='auto', 'ddp', 'lowbit_sharded', 'lowbit_deepspeed_stage_2' or a ModelParallelStrategy"
        )
    if isinstance(in_use, Int8Mixed) and theirs and not isinstance(in_use, DeepSpeedInt8MixedPrecision):
        raise PrecisionNotApplied(
            f"precision={NAME!r} doesn't work with {type(strategy).__name__}, which brings its own precision plugin "
            "and would bypass this one; use strategy='auto', 'ddp', 'lowbit_deepspeed_stage_2' or a "
            "ModelParallelStrategy"
        )
    if wanted and not isinstance(in_use, plugin):
        raise PrecisionNotApplied(
            f"precision={NAME!r} was asked for but Lightning {lightning.__version__} chose {type(in_use).__name__}; "
            f"pass plugins=[{plugin.__name__}()], and please report this"
        )
