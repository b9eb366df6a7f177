"""The optimizer step, and its norms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.arguments import SCALARS, StepArguments, StepScalars, as_int64
from lowbit_lightning.kernels.dispatch import declare, run, serving


def optimizer_step(
    arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars, norms: Tensor | None = None
) -> None:
    """One optimizer step for all parameters of ``arguments``, in place; see ``StepArguments``, ``StepScalars`` and the
    reference's ``optimizer_step``.

    ``grads``: one for each parameter, of its shape; float32, float16 or bfloat16, all alike. ``norms``: what
    ``optimizer_norms`` returned, summed over the ranks that share a parameter; only for rules with norms.

    Raises:
        TypeError, ValueError: naming the argument, before anything is changed.
    """
    arguments.check_step(grads, scalars)
    rule = rules.get(arguments.rule)
    expected = (len(arguments.params), len(rule.norms))
    if rule.norms and (norms is None or tuple(norms.shape) != expected):
        raise ValueError(
            f"norms must be float64 of shape {expected} for rule {rule.name!r}; optimizer_norms gives them"
        )
    norms = norms if rule.norms else None
    if _through_dispatcher(arguments):
        _step_op(*_flatten(arguments, grads, scalars), norms)
    else:
        _step(arguments, grads, scalars, norms)


def optimizer_norms(arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars) -> Tensor:
    """Sums of squares of the values whose norms the rule needs: float64 ``[n, len(rule.norms)]``, summed in a fixed
    order.

    This is the first phase of rules with a trust ratio. The arguments are those of the step. Nothing is changed.
    """
    arguments.check_step(grads, scalars)
    if _through_dispatcher(arguments):
        return _norms_op(*_flatten(arguments, grads, scalars))
    return _norms(arguments, grads, scalars)


def _through_dispatcher(arguments: StepArguments) -> bool:
    """Whether torch has to see the op: while it traces, and for tensor subclasses. Otherwise its dispatcher is avoided,
    which takes milliseconds for thousands of tensors."""
    return torch.compiler.is_compiling() or not arguments.plain


def _step(arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars, norms: Tensor | None) -> None:
    near, near_grads = _near(arguments, grads)
    run("optimizer_step", arguments.device, near, near_grads, scalars, norms)
    for original, p in zip(arguments.params, near.params, strict=True) if near is not arguments else ():
        if p is not original:
            original.copy_(p)
    torch.autograd.graph.increment_version(arguments.written)


def _norms(arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars) -> Tensor:
    return run("optimizer_norms", arguments.device, *_near(arguments, grads), scalars)


def _near(arguments: StepArguments, grads: Sequence[Tensor]) -> tuple[StepArguments, Sequence[Tensor]]:
    """The arguments with parameters and gradients that backends take; others are copied. All take contiguous ones; on
    the CPU a parameter and its gradient may both be channels_last."""
    if all(map(Tensor.is_contiguous, arguments.params)):
        taken = grads if all(map(Tensor.is_contiguous, grads)) else [g.contiguous() for g in grads]
        return arguments, taken
    formats = [torch.contiguous_format] * len(grads)
    if serving(arguments.device) != "cuda":
        formats = [_format(p) for p in arguments.params]
    params = [p.contiguous(memory_format=f) for p, f in zip(arguments.params, formats, strict=True)]
    near = [g.contiguous(memory_format=f) for g, f in zip(grads, formats, strict=True)]
    if all(p is original for p, original in zip(params, arguments.params, strict=True)):
        return arguments, near
    _warn_of_copies()
    return replace(arguments, params=params), near


def _format(p: Tensor) -> torch.memory_format:
    """That of the parameter if it is contiguous in one, or the default one."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(p.ndim)
    is_last = last is not None and not p.is_contiguous() and p.is_contiguous(memory_format=last)
    return last if is_last and last is not None else torch.contiguous_format


@cache
def _warn_of_copies() -> None:
    warnings.warn(
        "some parameters of an optimizer are not contiguous (or channels_last on a GPU): every step copies them, there "
        "and back; model.to(memory_format=torch.contiguous_format) before training avoids it",
        stacklevel=2,
    )


# -- the ops of torch, whose arguments are tensors and lists of tensors ----------------------------------------------

_ARGUMENTS = (
    "str rule, Tensor{a} params, Tensor{b} steps, Tensor{c} states, Tensor{d} scales, int block_size, int[] ordinals, "
    "int[] offsets, bool stochastic_rounding, Tensor{e} remainders"
)
_TYPES: dict[Any, str] = {Sequence[float]: "float[]", Tensor | None: "Tensor?", int: "int", bool: "bool"}
_SCALARS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in SCALARS.items())
_CHANGED, _READ = {x: f"({x}!)[]" for x in "abcde"}, dict.fromkeys("abcde", "[]")


def _flatten(a: StepArguments, grads: Sequence[Tensor], scalars: StepScalars) -> tuple:
    flat = {field.name: getattr(a, field.name) for field in fields(a)}
    flat |= {name: [t for tensors in flat[name] for t in tensors] for name in ("states", "scales")}
    return *flat.values(), list(grads), *scalars._replace(seed=as_int64(scalars.seed))


def _unflatten(*flat: Any) -> tuple[StepArguments, Sequence[Tensor], StepScalars]:
    count = len(fields(StepArguments))
    rule, params, steps, *nested = flat[:count]
    n = len(params)
    for i in range(2):
        nested[i] = [nested[i][s * n : (s + 1) * n] for s in range(len(rules.get(rule).states))]
    return StepArguments(rule, params, steps, *nested), flat[count], StepScalars(*flat[count + 1 :])


def _empty_norms(rule: str, params: list[Tensor], *_: Any) -> Tensor:
    return params[0].new_empty(len(params), len(rules.get(rule).norms), dtype=torch.float64)


_step_op = declare(
    f"optimizer_step({_ARGUMENTS.format(**_CHANGED)}, Tensor[] grads, {_SCALARS}, Tensor? norms) -> ()",
    fake=lambda *_: None,
    implementation=lambda *flat: _step(*_unflatten(*flat[:-1]), flat[-1]),
)
_norms_op = declare(
    f"optimizer_norms({_ARGUMENTS.format(**_READ)}, Tensor[] grads, {_SCALARS}) -> Tensor",
    fake=_empty_norms,
    implementation=lambda *flat: _norms(*_unflatten(*flat)),
)
