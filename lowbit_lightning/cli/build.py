"""Builds model, data and Trainer of a checked config, on LightningCLI.

Two things differ from LightningCLI: optimizer and scheduler are built in ``configure_optimizers``, when the strategy
has sharded the model, and an exception in a constructor is shown itself, with the key that asked for it.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, ReduceLROnPlateau, instantiate_class
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import Optimizer

from lowbit_lightning.cli.check import OWN
from lowbit_lightning.cli.config import ConfigError
from lowbit_lightning.optim import group_parameters


class LastCheckpoint(Callback):
    """Saves when training ends: ModelCheckpoint saves after a validation or an epoch, and more steps may follow."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class Builder(LightningCLI):
    """``model``, ``datamodule`` and ``trainer`` of a checked config. ``folder``: of the run; None builds nothing.

    Raises:
        ConfigError: for what LightningCLI refuses, and for an exception in a constructor.
    """

    def __init__(
        self, values: Mapping[str, Any], folder: Path | None = None, callbacks: tuple[Callback, ...] = ()
    ) -> None:
        self.folder, self.extra_callbacks = folder, callbacks
        self.groups: dict[str, dict[str, Any]] = values.get("parameter_groups") or {}
        given = {key: copy.deepcopy(value) for key, value in values.items() if key not in OWN and value is not None}
        try:
            with _old_names():
                super().__init__(
                    args=given, run=False, save_config_callback=None, parser_kwargs={"exit_on_error": False}
                )
        except ArgumentError as error:
            raise ConfigError(" ".join(str(error).split())) from None
        except Exception as error:  # whatever a constructor raises
            raise _explained(error, values) from error

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.config = parser.parse_object(args)

    def _set_seed(self) -> None:
        if self.folder is not None:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        if self.folder is not None:
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        assert self.folder is not None
        given = self.config_init["trainer"]
        loggers = given["logger"] if isinstance(given["logger"], list) else [given["logger"]]
        if loggers == [False]:
            logger: Any = False
        else:
            own = CSVLogger(self.folder, name=None, version="")
            logger = [own, *(one for one in loggers if not isinstance(one, bool) and one is not None)]
        callbacks = given["callbacks"] if isinstance(given["callbacks"], list) else [given["callbacks"]]
        callbacks = [*(callback for callback in callbacks if callback is not None), *self.extra_callbacks]
        if given["enable_progress_bar"] is not False and not any(isinstance(one, ProgressBar) for one in callbacks):
            callbacks.append(TQDMProgressBar())  # Lightning's other one, where rich is installed, prints "Epoch 0/-2"
        saved = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
        if not saved and given["enable_checkpointing"] is not False and not given["fast_dev_run"]:
            saved = [ModelCheckpoint(save_last=True)]
            callbacks += [*saved, LastCheckpoint(self.folder / "checkpoints" / "last.ckpt")]
        for callback in saved:
            callback.dirpath = callback.dirpath or str(self.folder / "checkpoints")
        self.config_init["trainer"]["callbacks"] = callbacks
        return super().instantiate_trainer(logger=logger, default_root_dir=str(self.folder), **kwargs)

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Instead of LightningCLI's, which would build the optimizer now."""
        optimizer, scheduler = self._get(self.config_init, "optimizer"), self._get(self.config_init, "lr_scheduler")
        if optimizer:
            groups = self.groups

            def configure(model: L.LightningModule) -> Any:
                return _configured(model, optimizer, scheduler, groups)

            self.model.configure_optimizers = MethodType(configure, self.model)

    def resolved(self, values: Mapping[str, Any]) -> str:
        """The config with all defaults, as YAML that ``lowbit fit --config`` takes."""
        own = {key: values[key] for key in OWN if values.get(key)}
        head = yaml.safe_dump(own, sort_keys=False) if own else ""
        with _old_names():
            return head + self.parser.dump(self.config, skip_none=False, format="yaml")


@contextmanager
def _old_names() -> Iterator[None]:
    """Lightning 2.6, and so we, call jsonargparse by names that it has renamed since; it warns of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*(JSONARGPARSE_DEPRECATION_WARNINGS|was deprecated in v4)")
        yield


def instantiate(node: Mapping[str, Any], base: type) -> Any:
    """The object of a class in a checked config; classes in its arguments too."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "it", fail_untyped=False, required=True)
    try:
        with _old_names():
            return parser.instantiate_classes(parser.parse_object({"it": copy.deepcopy(dict(node))})).it
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from None


def optimizer_of(model: nn.Module, node: Any, groups: Mapping[str, Any]) -> Optimizer:
    """The optimizer of a checked config over the trainable parameters of a model, in its groups."""
    made: Optimizer = instantiate_class(group_parameters(model, groups), node)
    return made


def _configured(model: nn.Module, optimizer: Any, scheduler: Any, groups: Mapping[str, Any]) -> Any:
    built = optimizer_of(model, optimizer, groups)
    if not scheduler:
        return built
    schedule = instantiate_class(built, scheduler)
    told: dict[str, Any] = {"scheduler": schedule, "interval": getattr(schedule, "interval", "epoch")}
    if isinstance(schedule, ReduceLROnPlateau):
        told["monitor"] = schedule.monitor
    return {"optimizer": built, "lr_scheduler": told}


def _explained(error: Exception, values: Mapping[str, Any]) -> ConfigError:
    """The exception that a constructor raised, without what was raised because of it, and the key that asked for it."""
    root: BaseException = error
    while root.__cause__ is not None and str(root).startswith(("Does not validate", "Problem with given class")):
        root = root.__cause__
    classes = {"lightning.pytorch.trainer.trainer.Trainer": "trainer"}
    classes |= {node["class_path"]: key for key, node in _classes(values)}
    frames = [*traceback.walk_tb(root.__traceback__)]
    for frame, _ in reversed(frames):
        cls = type(frame.f_locals.get("self"))
        key = classes.get(f"{cls.__module__}.{cls.__qualname__}")
        if key is not None:
            break
    else:
        key = "config"
    last = traceback.extract_tb(root.__traceback__)[-1]
    said = " ".join(str(root).split())
    return ConfigError(f"{key}: {type(root).__name__}: {said} ({Path(last.filename).name} line {last.lineno})")


def _classes(values: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every class of a checked config with its key."""
    if isinstance(values, dict) and "class_path" in values:
        yield prefix, values
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in pairs:
        yield from _classes(value, f"{prefix}.{name}" if prefix else str(name))
