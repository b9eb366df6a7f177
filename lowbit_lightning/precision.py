"""The Lightning and Fabric plugins behind ``precision="int8-mixed"``, and the registration of that string.

Requirements
    Lightning 2.5 or newer, imported as ``lightning``. ``pytorch_lightning`` is a separate copy of its classes and is
    refused by name.

How it works
    ``convert_module`` swaps the model's ``nn.Linear`` for ``Int8Linear`` in place (``convert.swap_linears`` has the
    filter); weights, gradients and optimizer see no difference. Everything else runs as in "bf16-mixed": under bf16
    autocast where the hardware computes in bf16, in float32 elsewhere. There is no loss scaling: bf16 and int8 with
    dynamic scales need none.

    Lightning has no registry for precision strings, so ``register`` wraps the constructor of the two classes that
    read them (the connectors of Trainer and Fabric) and turns the string into a plugin. What it relies on is checked
    first: where it is no longer so, it warns and leaves Lightning as it was (``plugins=[...]`` needs no
    registration); once Lightning knows the string itself, it stands down.

Interactions
    The environment variables ``PL_TRAINER_PRECISION`` and ``LT_PRECISION`` work like the argument. After ``fit`` the
    model stays converted; ``convert.restore(model)`` gives plain layers back.

Limitations
    FSDP1, DeepSpeed and XLA strategies bring a precision plugin of their own and are refused.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import inspect
import os
import platform
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Literal, get_args

import lightning
import torch
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from lowbit_lightning.convert import MIN_FEATURES, Report, swap_linears
from lowbit_lightning.layers import Product, Products

__all__ = ["FabricInt8MixedPrecision", "Int8MixedPrecision", "PrecisionNotApplied", "register"]

NAME = "int8-mixed"


class PrecisionNotApplied(RuntimeError):
    """``precision="int8-mixed"`` was asked for, but Lightning would run something else."""


# -- the plugins -----------------------------------------------------------------------------------------------------


class _Int8Mixed:
    """What the Trainer's and Fabric's plugin have in common."""

    precision: Any = NAME

    def __init__(
        self,
        *,
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
        filter: Callable[[str, nn.Linear], bool] | None = None,
        output_layer: str | None = "auto",
        min_features: int = MIN_FEATURES,
        forward: Product = "int8",
        grad_input: Product = "int8",
        grad_weight: Product = "int8",
        autocast: Literal["auto", "bf16", "off"] = "auto",
    ) -> None:
        if autocast not in ("auto", "bf16", "off"):
            raise ValueError(f"autocast must be 'auto', 'bf16' or 'off', got {autocast!r}")
        if str(Products(forward, grad_input, grad_weight)) == "nothing":
            rank_zero_warn("int8-mixed with forward, grad_input and grad_weight all 'high' runs nothing in int8")
        self.autocast = autocast
        self.report: Report | None = None
        self._swap = functools.partial(
            swap_linears,
            include=include if isinstance(include, str) else tuple(include),
            exclude=exclude if isinstance(exclude, str) else tuple(exclude),
            filter=filter,
            output_layer=output_layer,
            min_features=min_features,
            forward=forward,
            grad_input=grad_input,
            grad_weight=grad_weight,
        )
        self._module: weakref.ref[nn.Module] | None = None
        self._warned = False

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Swap the layers in place (again: Lightning calls this for every fit, validate, test and predict)."""
        # ModelSummary doesn't know the string, says so, and assumes 32 bits: which is what the parameters have.
        warnings.filterwarnings("ignore", message=f"Precision {NAME} is not supported by the model summary")
        report = self._swap(module)
        if report != self.report:
            rank_zero_info(str(report))
        self.report, self._module = report, weakref.ref(module)
        return module

    def forward_context(self) -> AbstractContextManager:
        """bf16 autocast for all other ops, or nothing where bf16 isn't wanted or the hardware hasn't got it."""
        module = None if self._module is None else self._module()
        parameter = None if module is None else next(module.parameters(), None)
        device = "cpu" if parameter is None else parameter.device.type
        fast = computes_in_bf16(device)
        if self.autocast == "bf16" and not fast and not self._warned:
            self._warned = True
            rank_zero_warn(f"autocast='bf16' on {device}, whose hardware emulates bf16: 'auto' or 'off' is faster")
        if self.autocast == "bf16" or (self.autocast == "auto" and fast):
            return torch.autocast(device, torch.bfloat16)
        return nullcontext()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}  # a weak reference can't be pickled


class Int8MixedPrecision(_Int8Mixed, Precision):
    """Lightning's Trainer in int8: ``Trainer(precision="int8-mixed")`` with settings of one's own.

    Args:
        include, exclude, filter, output_layer, min_features: which ``nn.Linear`` to swap; see ``swap_linears``.
        forward, grad_input, grad_weight: "int8" or "high" (the input's dtype), for each of a layer's three products.
        autocast: what other ops run in: "auto" (bf16 autocast where the hardware computes in bf16), "bf16", "off".

    ``report`` says what was swapped, what was skipped and why, once a run has begun; it is logged too.

    Raises:
        ValueError: an unknown setting; and, when a run begins, a filter that leaves nothing to swap.

    Example::

        Trainer(plugins=[Int8MixedPrecision(exclude="encoder.*", grad_weight="high")])
    """


class FabricInt8MixedPrecision(_Int8Mixed, FabricPrecision):
    """``Int8MixedPrecision`` for Fabric: ``Fabric(precision="int8-mixed")`` with settings of one's own."""

    def convert_output(self, data: Any) -> Any:
        """Floating-point outputs in the default dtype, as in Fabric's "bf16-mixed"."""
        return apply_to_collection(data, Tensor, _to_default_dtype)


def _to_default_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


@functools.cache
def computes_in_bf16(device_type: str) -> bool:
    """Whether the hardware multiplies bf16 itself: on others autocast would convert back and forth for nothing."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        tests = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(test() for test in tests)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# -- the string ------------------------------------------------------------------------------------------------------


def register() -> None:
    """Make ``lightning.Trainer`` and ``lightning.Fabric`` know ``precision="int8-mixed"``; idempotent."""
    from lightning.fabric.connector import _Connector
    from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    if NAME not in get_args(_PRECISION_INPUT_STR):
        _wrap(_AcceleratorConnector, Int8MixedPrecision, "precision_plugin")
        _wrap(_Connector, FabricInt8MixedPrecision, "precision")
    _watch_pytorch_lightning()


def _wrap(connector: type, plugin: type[Any], attribute: str) -> None:
    original = connector.__init__  # type: ignore[misc]
    if hasattr(original, "_lowbit_lightning"):
        return
    signature = inspect.signature(original)
    missing = {"precision", "plugins", "strategy"} - set(signature.parameters)
    if missing:
        rank_zero_warn(
            f"precision={NAME!r} can't be registered with Lightning {lightning.__version__}: {connector.__name__} no "
            f"longer takes {sorted(missing)}; pass plugins=[{plugin.__name__}()] instead"
        )
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        wanted = _precision(connector, bound.arguments.get("precision")) == NAME
        plugins = _listed(bound.arguments.get("plugins"))
        _check_plugins(plugins, plugin, wanted)
        if wanted:
            bound.arguments.update(precision=None, plugins=[*plugins, plugin()])
        with _without_variable("LT_PRECISION" if wanted else None):
            original(*bound.args, **bound.kwargs)
        _check_result(self.strategy, getattr(self, attribute, None), plugin, wanted)

    __init__._lowbit_lightning = True  # type: ignore[attr-defined]
    connector.__init__ = __init__  # type: ignore[misc]


def _precision(connector: Any, argument: Any) -> Any:
    """The precision asked for: Fabric lets LT_PRECISION overrule its argument; the Trainer has read its variable."""
    from_env = getattr(connector, "_argument_from_env", None)
    return argument if from_env is None else from_env("precision", argument, default=None)


def _listed(plugins: Any) -> list[Any]:
    if plugins is None:
        return []
    return list(plugins) if isinstance(plugins, Iterable) else [plugins]


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
        if isinstance(given, _Int8Mixed) and not isinstance(given, plugin):
            raise TypeError(f"plugins=[{type(given).__name__}(...)] doesn't fit here; use {plugin.__name__}(...)")


def _check_result(strategy: Any, in_use: Any, plugin: type[Any], wanted: bool) -> None:
    own = ("DeepSpeedStrategy", "FSDPStrategy", "XLAStrategy", "SingleDeviceXLAStrategy", "XLAFSDPStrategy")
    if isinstance(in_use, _Int8Mixed) and any(base.__name__ in own for base in type(strategy).__mro__):
        raise PrecisionNotApplied(
            f"precision={NAME!r} doesn't work with {type(strategy).__name__}, which brings its own precision plugin "
            "and would bypass this one; use strategy='auto', 'ddp' or a ModelParallelStrategy"
        )
    if wanted and not isinstance(in_use, plugin):
        raise PrecisionNotApplied(
            f"precision={NAME!r} was asked for but Lightning {lightning.__version__} chose {type(in_use).__name__}; "
            f"pass plugins=[{plugin.__name__}()], and please report this"
        )


# -- pytorch_lightning -----------------------------------------------------------------------------------------------

_THEIR_CONNECTOR = "pytorch_lightning.trainer.connectors.accelerator_connector"


def _watch_pytorch_lightning() -> None:
    """Refuse the string there with a reason, now or when it is imported; importing it here would cost seconds."""
    module = sys.modules.get(_THEIR_CONNECTOR)
    if module is not None:
        _refuse(module)
    elif not any(isinstance(finder, _PytorchLightningFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PytorchLightningFinder())


class _PytorchLightningFinder(importlib.abc.MetaPathFinder):
    """Runs ``_refuse`` on one module of pytorch_lightning after its import, and changes nothing else."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _THEIR_CONNECTOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _refuse(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _refuse(module: ModuleType) -> None:
    original = module._AcceleratorConnector.__init__
    if hasattr(original, "_lowbit_lightning"):
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plugins = _listed(kwargs.get("plugins"))
        if kwargs.get("precision") == NAME or any(isinstance(p, _Int8Mixed) for p in plugins):
            raise PrecisionNotApplied(
                f"precision={NAME!r} needs `import lightning as L` and L.Trainer, L.LightningModule: "
                "pytorch_lightning is a separate copy of Lightning's classes, which lowbit_lightning doesn't extend"
            )
        original(self, *args, **kwargs)

    __init__._lowbit_lightning = True  # type: ignore[attr-defined]
    module._AcceleratorConnector.__init__ = __init__
