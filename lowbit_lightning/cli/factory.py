"""``package.module:factory`` on the command line: the user's own function or class, which makes a model."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowbit_lightning.cli import UserCodeError


def make_model(path: str) -> nn.Module:
    """What ``package.module:factory`` makes on the meta device. The current folder counts as one to import from. A
    LightningModule that has no parameters yet makes them in its ``configure_model``, as a Trainer would have it."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"model must be package.module:factory, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"model={path!r}: cannot import {module_name}: {error}; run it in the folder that holds it, or install it"
        ) from error
    factory: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(factory):
        own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name}
        callables = sorted(key for key, value in own.items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"model={path!r}: {module_name} has no callable {name!r}; of its own it has {callables}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(
            f"model={path!r}: it must be callable without arguments ({error}); write a function that gives them"
        ) from error
    model = on_meta(factory, f"model={path!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={path!r}: it must make a torch.nn.Module, got {type(model).__name__}")
    return model


def on_meta(make: Callable[[], Any], what: str) -> Any:
    """What ``make`` makes on the meta device; a LightningModule's parameters too. ``what``: for errors."""
    try:
        with torch.device("meta"):
            model = make()
            if isinstance(model, nn.Module) and next(model.parameters(), None) is None:
                getattr(model, "configure_model", lambda: None)()
    except Exception as error:  # whatever the model's own code raises, where tensors have no values
        raise UserCodeError(
            f"{what}: making it on the meta device raised {type(error).__name__}: {error}; what needs values "
            "there (.item(), numpy) has to be left out of the factory"
        ) from error
    return model
