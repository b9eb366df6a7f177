"""Coming from torch.optim, and parameters chosen by name."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from lowbit_lightning.optim import family
from lowbit_lightning.optim.base import LowBitOptimizer
from lowbit_lightning.optim.options import OtherOptions, complete_options, warn_of_inert

_TWINS: dict[type[Optimizer], type[LowBitOptimizer]] = {
    torch.optim.SGD: family.SGD,
    torch.optim.Adam: family.Adam,
    torch.optim.AdamW: family.AdamW,
    torch.optim.RMSprop: family.RMSprop,
    torch.optim.Adagrad: family.Adagrad,
}


def has_twin(optimizer: Optimizer) -> bool:
    """Whether ``convert_`` knows an optimizer's class."""
    return type(optimizer) in _TWINS


def convert_(optimizer: Optimizer, bits: int = 8, **options: Unpack[OtherOptions]) -> LowBitOptimizer:
    """Turn a torch.optim optimizer into its low-bit twin, in place. The object stays the same, so schedulers and hooks
    stay valid.

    Groups, hyperparameters and states are kept; states are converted. ``bits`` and ``options`` are those of all
    optimizers of this package, except ``maximize``, which a group has already. A group's own keys override them.

    Returns:
        the optimizer itself.

    Raises:
        TypeError: for a subclass, or an optimizer that has no twin here.
        ValueError: for options out of range, states that do not fit, or a ``step`` that something other than a
            scheduler replaced. Nothing is changed then.
    """
    kind = type(optimizer)
    if kind not in _TWINS:
        known = sorted(f"torch.optim.{k.__name__}" for k in _TWINS)
        raise TypeError(
            f"optimizer must be exactly one of {known}, got {kind.__module__}.{kind.__qualname__}; a subclass may "
            "update otherwise than its base, so build one of lowbit_lightning.optim in its place"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("differentiable=True is not supported: the fused step has no gradient")
    if "maximize" in options:
        raise ValueError("maximize is a key of the optimizer's groups: set it there, not in convert_")
    replaced = vars(optimizer).get("step")
    if replaced is not None and not hasattr(replaced, "_wrapped_by_lr_sched"):
        raise ValueError(
            f"optimizer.step was replaced by {replaced!r}, which would continue to call the old step: convert the "
            "optimizer before its step is replaced"
        )
    own = complete_options({"bits": bits, **options})
    optimizer.__class__ = _TWINS[kind]
    assert isinstance(optimizer, LowBitOptimizer)
    try:
        groups, states = optimizer.taken_over([{**own, **group} for group in optimizer.param_groups])
    except BaseException:
        optimizer.__class__ = kind  # type: ignore[assignment]
        raise
    for group, adopted in zip(optimizer.param_groups, groups, strict=True):
        group.update(adopted)
    optimizer.state.update(states)
    optimizer.defaults = {**own, "state_format": None, **optimizer.defaults}
    _rewire_step(optimizer)
    for group in optimizer.param_groups:
        warn_of_inert(group, stacklevel=2)
    return optimizer


def _rewire_step(optimizer: Optimizer) -> None:
    """Make hooks and schedulers call the new class's ``step``: both keep a reference to the ``step`` that they first
    saw."""
    optimizer._patch_step_function()
    if "step" not in vars(optimizer):
        return
    reference = weakref.ref(optimizer)

    @wraps(type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        this = reference()
        assert this is not None
        this._opt_called = True  # type: ignore[attr-defined]
        return type(this).step(this, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]


def group_parameters(model: nn.Module, overrides: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Param groups of a model's parameters by name: ``{"*embed*": {"bits": 32}, "*norm*": {"weight_decay": 0.0}}``.

    Keys are shell patterns over the names of ``model.named_parameters()``; the first that matches counts. Parameters
    that no pattern matches form the first group, with the optimizer's defaults; one group for each pattern follows, in
    the order of ``overrides``. Frozen parameters are left out.

    Raises:
        ValueError: for a pattern that matches no remaining trainable parameter, and for a model without trainable
            parameters.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    chosen: dict[str | None, list[nn.Parameter]] = {None: [], **{pattern: [] for pattern in overrides}}
    for name, p in named:
        chosen[next((pattern for pattern in overrides if fnmatchcase(name, pattern)), None)].append(p)
    for pattern in overrides:
        if not chosen[pattern]:
            taken = [name for name, _ in named if fnmatchcase(name, pattern)]
            reason = f"an earlier pattern takes {taken}: put the narrower one first" if taken else "none matches"
            raise ValueError(
                f"no trainable parameter is left for the pattern {pattern!r}: {reason}; there are "
                f"{[name for name, _ in named]}"
            )
    return [
        {**(overrides[pattern] if pattern is not None else {}), "params": params}
        for pattern, params in chosen.items()
        if params
    ]
