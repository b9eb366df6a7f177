"""The optimizer step, and its norms."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.arguments import StepArguments, as_int64
from lowbit_lightning.kernels.dispatch import declare, run


def optimizer_step(arguments: StepArguments, norms: Tensor | None = None) -> None:
    """One optimizer step for all parameters of a group, in place; see ``StepArguments`` and ``reference/step.py``.

    ``norms``: what ``optimizer_norms`` returned, summed over the ranks that share a parameter; only for rules with
    norms.

    Raises:
        TypeError, ValueError: naming the argument, before anything is changed.
    """
    arguments.check()
    rule = rules.get(arguments.rule)
    expected = (len(arguments.params), len(rule.norms))
    if rule.norms and (norms is None or tuple(norms.shape) != expected):
        raise ValueError(
            f"norms must be float64 of shape {expected} for rule {rule.name!r}; optimizer_norms gives them"
        )
    norms = norms if rule.norms else None
    if _through_dispatcher(arguments):
        _step_op(*_flatten(arguments), norms)
    else:
        _step(arguments, norms)


def optimizer_norms(arguments: StepArguments) -> Tensor:
    """Sums of squares of what the rule wants norms of: float64 ``[n, len(rule.norms)]``, in a fixed order of
    summation.

    The first phase of rules with a trust ratio; reads the arguments and changes nothing.
    """
    arguments.check()
    if _through_dispatcher(arguments):
        return _norms_op(*_flatten(arguments))
    return _norms(arguments)


def _through_dispatcher(arguments: StepArguments) -> bool:
    """Whether torch has to see the op: when it traces, or with tensor subclasses. Thousands of tensors take it
    milliseconds, a good part of what the step itself takes."""
    return torch.compiler.is_compiling() or any(type(p) not in (Tensor, torch.nn.Parameter) for p in arguments.params)


def _flatten(a: StepArguments) -> tuple:
    states, scales = [t for s in a.states for t in s], [t for s in a.scales for t in s]
    tensors = a.rule, a.params, a.grads, a.steps, states, scales, a.hyper, a.block_size, a.lr, a.unscale, a.clip, a.skip
    return *tensors, as_int64(a.seed), a.ordinals, a.offsets, a.maximize, a.stochastic_rounding, a.remainders


def _unflatten(*flat: Any) -> StepArguments:
    rule, params, grads, steps, states, scales, hyper, block_size, *rest = flat
    n, count = len(params), len(rules.get(rule).states)
    nested = [[flat[s * n : (s + 1) * n] for s in range(count)] for flat in (states, scales)]
    return StepArguments(rule, params, grads, steps, nested[0], nested[1], list(hyper), block_size, *rest)


def _step(arguments: StepArguments, norms: Tensor | None) -> None:
    contiguous = _contiguous(arguments)
    for indices, part in contiguous.parts():
        chosen = norms if norms is None or part is contiguous else norms.index_select(0, _index(part, indices))
        run("optimizer_step", arguments.device, part, chosen)
    for original, p, step in zip(arguments.params, contiguous.params, arguments.steps, strict=True):
        if p is not original:
            original.copy_(p)
        if not p.numel():  # an empty shard: its count keeps pace with the other ranks'
            step.add_(1.0 if arguments.skip is None else (arguments.skip == 0).float().reshape(()))
    torch.autograd.graph.increment_version(_written(arguments))


def _index(part: StepArguments, indices: list[int]) -> Tensor:
    """The indices of a part's parameters, on their device; sent there once, since every copy waits for the host."""
    if "index" not in part.cache:
        part.cache["index"] = torch.tensor(indices, device=part.device)
    return part.cache["index"]


def _written(arguments: StepArguments) -> list[Tensor]:
    """All that a step writes: autograd must see that a saved tensor was overwritten by a kernel."""
    if "written" not in arguments.cache:
        a = arguments
        tensors = [*a.params, *a.steps, *a.remainders, *(t for s in (*a.states, *a.scales) for t in s)]
        arguments.cache["written"] = [t for t in dict.fromkeys(tensors) if not t.is_inference()]
    return arguments.cache["written"]


def _contiguous(arguments: StepArguments) -> StepArguments:
    """The arguments with copies of what is not contiguous: parameters and gradients in channels_last, say."""
    grads = arguments.grads
    if not all(g.is_contiguous() for g in grads):
        grads = arguments.grads = [g.contiguous() for g in grads]
    if all(p.is_contiguous() for p in arguments.params):
        return arguments
    _warn_of_copies()
    return replace(arguments, params=[p.contiguous() for p in arguments.params])


@cache
def _warn_of_copies() -> None:
    warnings.warn(
        "an optimizer's parameters are not all contiguous (channels_last, say): every step copies those that are not, "
        "there and back; model.to(memory_format=torch.contiguous_format) before training avoids it",
        stacklevel=2,
    )


def _norms(arguments: StepArguments) -> Tensor:
    contiguous = _contiguous(arguments)
    result = _empty_norms(arguments.rule, arguments.params).zero_()
    for indices, part in contiguous.parts():
        found = run("optimizer_norms", arguments.device, part)
        if part is contiguous:
            return found
        result.index_copy_(0, _index(part, indices), found)
    return result


def _empty_norms(rule: str, params: list[Tensor], *_: Any) -> Tensor:
    device = params[0].device if params else None
    return torch.empty(len(params), len(rules.get(rule).norms), dtype=torch.float64, device=device)


_STEP = (
    "str rule, Tensor{a} params, Tensor[] grads, Tensor{b} steps, Tensor{c} states, Tensor{d} scales, float[] hyper, "
    "int block_size, Tensor? lr, Tensor? unscale, Tensor? clip, Tensor? skip, int seed, int[] ordinals, int[] offsets, "
    "bool maximize, bool stochastic_rounding, Tensor{e} remainders"
)
_step_op = declare(
    f"optimizer_step({_STEP.format(**{x: f'({x}!)[]' for x in 'abcde'})}, Tensor? norms) -> ()",
    fake=lambda *_: None,
    implementation=lambda *flat: _step(_unflatten(*flat[:-1]), flat[-1]),
)
_norms_op = declare(
    f"optimizer_norms({_STEP.format(**dict.fromkeys('abcde', '[]'))}) -> Tensor",
    fake=_empty_norms,
    implementation=lambda *flat: _norms(_unflatten(*flat)),
)
