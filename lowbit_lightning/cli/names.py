"""What a config may name: classes by short names, strategies, precisions, accelerators.

A short name means one of this package's classes if it has one of that name, otherwise torch's or Lightning's:
``optimizer: AdamW`` is ``lowbit_lightning.optim.AdamW``. A dotted path names any class that can be imported from the
current folder or the environment."""

from __future__ import annotations

import inspect
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerTypeTuple
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lowbit_lightning.cli.config import ConfigError, meant


@dataclass(frozen=True)
class Place:
    """Where a config names classes. ``given``: constructor arguments that are no setting. ``what``: for errors."""

    what: str
    base: tuple[type, ...]
    modules: tuple[str, ...]
    given: frozenset[str] = frozenset()

    @property
    def names(self) -> dict[str, type]:
        return _names(self)


PLACES = {
    "model": Place("model", (L.LightningModule,), ("lowbit_lightning.experiments",)),
    "data": Place("data", (L.LightningDataModule,), ("lowbit_lightning.experiments",)),
    "optimizer": Place(
        "optimizer", (torch.optim.Optimizer,), ("lowbit_lightning.optim", "torch.optim"), frozenset({"params"})
    ),
    "lr_scheduler": Place(
        "lr_scheduler",
        LRSchedulerTypeTuple,
        ("lowbit_lightning.experiments", "lightning.pytorch.cli", "torch.optim.lr_scheduler"),
        frozenset({"optimizer"}),
    ),
    "trainer.callbacks": Place("callback", (Callback,), ("lowbit_lightning.callbacks", "lightning.pytorch.callbacks")),
    "trainer.logger": Place("logger", (Logger,), ("lightning.pytorch.loggers",)),
    "trainer.profiler": Place("profiler", (Profiler,), ("lightning.pytorch.profilers",)),
    "trainer.plugins": Place(
        "plugin",
        (object,),
        ("lowbit_lightning.precision", "lowbit_lightning.strategies", "lightning.pytorch.plugins"),
    ),
    "trainer.strategy": Place("strategy", (Strategy,), ("lowbit_lightning.strategies", "lightning.pytorch.strategies")),
}


@cache
def _names(place: Place) -> dict[str, type]:
    found: dict[str, type] = {}
    for module in map(import_module, place.modules):
        for name, value in vars(module).items():
            known = isinstance(value, type) and issubclass(value, place.base) and not name.startswith("_")
            if known and value not in place.base and not inspect.isabstract(value):
                found.setdefault(name, value)
    return found


def find(place: Place, name: Any, at: str) -> type:
    """The class of a short name or a dotted path.

    Raises:
        ConfigError: if there is none, or it is of another kind; it begins with ``at``.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{at}: a {place.what} is the name of a class, got {name!r}")
    found = _imported(place, name, at) if "." in name else place.names.get(name)
    if found is None:
        short = sorted(place.names) if place.base != (object,) else []
        some = f"{meant(name, place.names)} Short names: {', '.join(short)}; any other class by its full path"
        raise ConfigError(f"{at}: no {place.what} {name!r}; {some.strip()}")
    if not isinstance(found, type) or not issubclass(found, place.base):
        kinds = " or ".join(base.__name__ for base in place.base)
        raise ConfigError(f"{at}: {name} is not a {kinds}")
    return found


def _imported(place: Place, path: str, at: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or "?"):
            raise ConfigError(
                f"{at}: no module {error.name!r}; run this in the folder that holds it, or install it"
            ) from None
        raise ConfigError(f"{at}: importing {module_name} raised {type(error).__name__}: {error}") from error
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"{at}: importing {module_name} raised {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        own = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, place.base)]
        raise ConfigError(f"{at}: {module_name} has no {name!r}; {meant(name, own)}".rstrip("; "))
    return getattr(module, name)


@cache
def precisions() -> list[str]:
    """The strings that ``trainer.precision`` may be."""
    allowed = inspect.unwrap(L.Trainer.__init__).__annotations__["precision"]  # type: ignore[misc]
    return sorted({str(value) for value in _literals(allowed) if value is not None})


def _literals(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    if not inner:
        return [annotation] if isinstance(annotation, (str, int)) else []
    return [value for one in inner for value in _literals(one)]


def strategies() -> list[str]:
    return sorted({"auto", "ddp", *StrategyRegistry.available_strategies()})


def accelerators() -> list[str]:
    return sorted({"auto", "gpu", *AcceleratorRegistry.available_accelerators()})


def registered_strategy(name: str) -> dict[str, Any] | None:
    """The class and arguments behind a strategy's name; None for a name without."""
    if name not in StrategyRegistry:
        return None
    entry = StrategyRegistry[name]
    cls = entry["strategy"]
    return {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": dict(entry["init_params"])}
