"""Hooks of accelerate, which replace a module's ``forward`` on the object and remember the one of its class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules have no hooks inside, where their classes may change, and get them again."""
    hooked = [(module, module._hf_hook) for module in modules if hasattr(module, "_hf_hook")]
    if not hooked:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    for module, _ in hooked:
        remove_hook_from_module(module)
        vars(module).pop("forward", None)  # the forward of its class, which accelerate leaves on the object
    yield
    for module, hook in hooked:
        add_hook_to_module(module, hook)
