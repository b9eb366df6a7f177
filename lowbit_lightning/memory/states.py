"""Bytes of optimizer states: the sum over the forms that the optimizers give their parameters. The states of other
optimizers are found by a step on the meta device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowbit_lightning import optim
from lowbit_lightning.optim.settings import state_bits
from lowbit_lightning.state.form import Paging
from lowbit_lightning.state.pages.layout import Want, lay_out

Kind = str | type[Optimizer] | Optimizer
Parts = Mapping[nn.Parameter, nn.Parameter]
"""The model's trainable parameters -> this rank's parts of them, on the meta device, in the dtype of the run."""


def make(
    kind: Kind, bits: int | None, parts: Parts, convert: bool, options: dict[str, Any], paging: dict[str, Any]
) -> Optimizer:
    """The optimizer over the parts.

    ``convert``: an optimizer of torch.optim becomes its twin, as in the sharded strategy. ``paging``: options of this
    package's optimizers and of twins.

    Raises:
        ValueError, TypeError: for a name, class, instance or option that cannot be used; the error names it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will say what options do nothing
        made = _made(kind, bits, parts, options, paging)
        if convert and bits is not None and type(made).__module__.startswith("torch.optim."):
            optim.convert_(made, bits=bits, **paging)
    if paging and not isinstance(made, optim.LowBitOptimizer):
        raise ValueError(
            f"paged={paging['paged']!r} needs an optimizer of lowbit_lightning.optim, or strategy='sharded', which "
            f"makes one of torch.optim's; got optimizer={type(made).__name__}"
        )
    return made


def _made(kind: Kind, bits: int | None, parts: Parts, options: dict[str, Any], paging: dict[str, Any]) -> Optimizer:
    if isinstance(kind, Optimizer):
        ours = isinstance(kind, optim.LowBitOptimizer)
        given = sorted({**options, **(paging if ours else {})})
        if given:
            raise ValueError(f"{given} cannot be set: optimizer is an instance and has its own settings")
        return _remade(kind, parts)
    cls = _named(kind, bits) if isinstance(kind, str) else kind
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"optimizer must be a name, a class or an instance of torch.optim.Optimizer, got {kind!r}")
    if issubclass(cls, optim.LowBitOptimizer):
        options = {"bits": 32 if bits is None else bits, **paging, **options}
    try:
        return cls(list(parts.values()), **options)  # type: ignore[call-arg, arg-type]
    except TypeError as error:
        raise TypeError(f"optimizer={cls.__name__} with options {options}: {error}") from error


def _named(name: str, bits: int | None) -> type[Optimizer]:
    ours = {key: value for key, value in vars(optim).items() if isinstance(value, type) and key != "LowBitOptimizer"}
    ours = {key: value for key, value in ours.items() if issubclass(value, Optimizer)}
    theirs = getattr(torch.optim, name, None)
    if bits is None and isinstance(theirs, type) and issubclass(theirs, Optimizer):
        return theirs
    if name not in ours:
        raise ValueError(
            f"optimizer must be one of {sorted(ours)}, or with bits=None a name of torch.optim, got {name!r}; "
            "any other is planned from its class or an instance"
        )
    return ours[name]


def _remade(optimizer: Optimizer, parts: Parts) -> Optimizer:
    """An optimizer of the same class and groups over the parts."""
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        strangers = [p for p in group["params"] if p.requires_grad and p not in parts]
        if strangers:
            raise ValueError(
                f"optimizer's group {number} holds {len(strangers)} parameters that do not belong to the model, "
                f"the first of shape {tuple(strangers[0].shape)}: build it from model.parameters()"
            )
        groups.append({**group, "params": [parts[p] for p in group["params"] if p in parts]})
    return type(optimizer)([group for group in groups if group["params"]])  # type: ignore[call-arg]


def check_release(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer that cannot release gradients."""
    if not isinstance(optimizer, optim.LowBitOptimizer):
        raise ValueError(
            "release_gradients=True needs an optimizer of lowbit_lightning.optim, or strategy='sharded', which makes "
            f"one of torch.optim's; got optimizer={type(optimizer).__name__}"
        )


def count(
    optimizer: Optimizer, parts: Parts, ranks: int, order: Mapping[nn.Parameter, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes near by kind, of parts cut among ``ranks``: "codes", "scales", "32-bit", "steps", "master remainders",
    and "pages"; those of other optimizers are "32-bit" and "steps". And bytes that are paged out, by place. ``order``:
    the places of parts in a step that takes them one by one; empty where it does not."""
    whole = {part: p for p, part in parts.items()}
    if not isinstance(optimizer, optim.LowBitOptimizer):
        return _stepped(optimizer), {}
    found: Counter[str] = Counter()
    wants: list[tuple[int, Want]] = []
    pages: list[Paging] = []
    for group in optimizer.param_groups:
        settings = optimizer.settings(group)
        for part in group["params"]:
            cut_vector = ranks > 1 and part.ndim < 2
            p = whole[part]
            form = settings.form(p.shape, part.dtype, keeps_grid=not cut_vector, own_bits=state_bits(p))
            found += form.nbytes(part.shape)
            want = form.want(part.shape)
            if want is not None and form.paging is not None:
                wants.append((order.get(part, len(order)), want))
                pages.append(form.paging)
    if not wants:
        return dict(found), {}
    plan = lay_out([want for _, want in sorted(wants, key=lambda pair: pair[0])], pages[0].resident)
    return {**found, "pages": plan.near_bytes}, {"disk" if pages[0].kind == "disk" else "host memory": plan.nbytes}


def _stepped(optimizer: Optimizer) -> dict[str, int]:
    """The content of ``optimizer.state`` after a step on the meta device."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"optimizer={type(optimizer).__name__} cannot be planned: its step needs values, and there are none on the "
            f"meta device ({str(error).splitlines()[0]})"
        ) from error
    found: Counter[str] = Counter()
    for entries in optimizer.state.values():
        for value in entries.values():
            if isinstance(value, Tensor):
                found["steps" if value.ndim == 0 else "32-bit"] += value.nbytes
    return dict(found)
