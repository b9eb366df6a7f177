"""Which backend runs an op, and how often each did.

A backend is a module of this package with the functions of ``reference``; it is loaded at the first call on its device.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from lowbit_lightning.kernels.compile import CompilerNotFound

BACKENDS = ("reference", "cpu", "cuda")

_calls: Counter[tuple[str, str]] = Counter()
_forced: list[str] = []


def calls() -> dict[tuple[str, str], int]:
    """How often each op ran on each backend since the last ``reset_calls``: ``{("int8_matmul", "cpu"): 12}``."""
    return dict(_calls)


def reset_calls() -> None:
    """Set all counts of ``calls`` to zero."""
    _calls.clear()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on the backend ``name`` ("reference", "cpu" or "cuda"), whatever the device."""
    load(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.remove(name)


@cache
def load(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    module = import_module(f"lowbit_lightning.kernels.{name}")
    if name != "reference":
        module.load()
    return module


@cache
def _backend_name(device_type: str) -> str:
    name = os.environ.get("LOWBIT_LIGHTNING_BACKEND") or (device_type if device_type in BACKENDS else "reference")
    reason = f"there is no backend for device type {device_type!r}"
    try:
        load(name)
    except CompilerNotFound as error:
        name, reason = "reference", str(error)
    if name == "reference" and "LOWBIT_LIGHTNING_BACKEND" not in os.environ:
        warnings.warn(
            f"lowbit_lightning uses its plain-torch reference on {device_type}, which is many times slower: {reason}",
            stacklevel=2,
        )
    return name


def run(op: str, device: torch.device, *arguments: Any) -> Any:
    name = _forced[-1] if _forced else _backend_name(device.type)
    _calls[op, name] += 1
    return getattr(load(name), op)(*arguments)
