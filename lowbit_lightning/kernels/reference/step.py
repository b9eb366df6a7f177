"""The optimizer step and its norms, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_lightning.kernels import formats, rules
from lowbit_lightning.kernels.arguments import StepArguments, StepScalars
from lowbit_lightning.kernels.reference.blockwise import of_elements, quantize_blockwise, to_blocks
from lowbit_lightning.kernels.reference.words import random_words, round_stochastically


def optimizer_step(
    arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars, norms: Tensor | None
) -> None:
    """One step of ``arguments.rule``, in place, on parameters, states, scales and step counts.

    ``norms``: float64 ``[n, len(rule.norms)]``, sums of squares, as ``optimizer_norms`` returns them (summed over
    ranks by the caller); None for rules without norms.

    For each element: the gradient is multiplied by ``unscale * clip``, and negated if ``maximize``. Codes are looked up
    in their codebook. The rule runs, and multiplies them by the scales of their blocks. The parameter is rounded to its
    dtype (to nearest, or stochastically), and the states are encoded.

    Non-finite values: if any new 8-bit state of an element is not finite (its gradient was not, or its square
    overflowed), all states of the element become zero, those in 32 bits too, and it does not count for any scale. So
    after a huge gradient no state of the element is left over. Its parameter is what the rule computed: NaN or infinite
    if the gradient was, as in torch, and mostly unchanged if only a square overflowed. If all states have 32 bits,
    nothing is reset: they stay infinite or NaN, as in torch. A NaN or infinite parameter, ``lr`` or factor makes the
    parameter NaN or infinite.
    If a state that is never negative has a value below zero (from a negative scale, which loading refuses), the value
    counts as zero. A zero keeps its sign only in 32 bits. If the step count is negative or NaN (loading refuses such a
    count), rules with bias corrections make the parameter NaN.
    """
    if scalars.skip is not None and bool(scalars.skip != 0):
        return
    rule = rules.get(arguments.rule)
    for i, p in enumerate(arguments.params):
        arguments.steps[i].add_(1)
        step = float(arguments.steps[i])
        numbers = rule.compute_scalars(_hyper(scalars), step, _roots(norms, i))
        values = rule.run("direction", _operands(arguments, grads, scalars, i), numbers, p.device)
        values = rule.run("finish", values, numbers, p.device)
        _store_states(arguments, rule, i, values)
        if arguments.remainders:
            split_master(values["p"], p, arguments.remainders[i])
        elif arguments.stochastic_rounding and p.dtype == torch.bfloat16:
            words = random_words(
                scalars.seed, arguments.ordinals[i], _step_word(step), arguments.offsets[i], p.numel(), p.device
            )
            p.copy_(round_stochastically(values["p"], words.view(p.shape)))
        else:
            p.copy_(values["p"])


def optimizer_norms(arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars) -> Tensor:
    """Sums of squares of the values that the rule names in ``norms``: float64 ``[n, len(rule.norms)]``.

    The order of summation is fixed: the float32 squares of a block (padded with zeros) are folded in halves (element
    j and j + half) in float32; the blocks' sums in float64 by ``fold_sums``. NaN and infinite values make the sum NaN
    or infinite, and so do values whose squares are beyond float32.
    """
    rule = rules.get(arguments.rule)
    result = torch.zeros(len(arguments.params), len(rule.norms), dtype=torch.float64, device=arguments.device)
    for i, p in enumerate(arguments.params):
        numbers = rule.compute_scalars(_hyper(scalars), float(arguments.steps[i]) + 1, None)
        values = rule.run("direction", _operands(arguments, grads, scalars, i), numbers, p.device)
        for k, name in enumerate(rule.norms):
            squares = to_blocks(values[name] * values[name], arguments.grid(i))
            result[i, k] = fold_sums(_fold_halves(squares).flatten().double())
    return result


def fold_sums(sums: Tensor) -> Tensor:
    """The sum of the sums of a tensor's blocks, ``[n, ...]`` -> ``[...]``, in a fixed order.

    Groups of ``formats.FOLD``, the last one padded with zeros, are folded in halves (element j and j + half), until one
    sum is left. Without blocks the sum is zero. So a tensor may be summed in pieces of whole folds: ``fold_sums`` of
    the pieces' sums is the same.
    """
    while len(sums) > 1:
        padding = sums.new_zeros(-len(sums) % formats.FOLD, *sums.shape[1:])
        groups = torch.cat([sums, padding]).view(-1, formats.FOLD, *sums.shape[1:])
        sums = _fold_halves(groups.movedim(1, -1))
    return sums[0] if len(sums) else sums.sum(0)


def _hyper(scalars: StepScalars) -> list[float]:
    if scalars.lr is None:
        return list(scalars.hyper)
    return [float(scalars.lr), *scalars.hyper[1:]]


def _roots(norms: Tensor | None, i: int) -> tuple[float, ...] | None:
    return None if norms is None else tuple(norms[i].sqrt().tolist())


def _step_word(step: float) -> int:
    """The step as it enters the random words: 0 if the count is not a valid one."""
    return int(step) if 0 <= step < 2**32 else 0


def _operands(arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars, i: int) -> dict[str, Tensor]:
    """p, g, the states and their scales of parameter i, float32."""
    factor = torch.ones((), dtype=torch.float32, device=arguments.device)
    for value in (scalars.unscale, scalars.clip):
        if value is not None:
            factor = factor * value.reshape(())
    g = grads[i].contiguous().float() * (-factor if scalars.maximize else factor)
    p = arguments.params[i].contiguous()
    operands = {"p": join_master(p, arguments.remainders[i]) if arguments.remainders else p.float(), "g": g}
    for s, state in enumerate(rules.get(arguments.rule).states):
        stored, scale = arguments.states[s][i], torch.ones((), dtype=torch.float32, device=arguments.device)
        if stored.dtype == torch.uint8:
            stored = formats.codebook(state.codebook).to(arguments.device)[stored.int()]
            scale = of_elements(arguments.scales[s][i], arguments.grid(i)).view(p.shape)
        operands |= {state.name: stored, f"{state.name}_scale": scale}
    return operands


def _store_states(arguments: StepArguments, rule: rules.Rule, i: int, values: dict[str, Tensor]) -> None:
    coded = [s for s in range(len(rule.states)) if arguments.states[s][i].dtype == torch.uint8]
    finite = torch.ones(arguments.params[i].shape, dtype=torch.bool, device=arguments.device)
    for s in coded:
        finite &= values[rule.states[s].name].isfinite()
    for s, state in enumerate(rule.states):
        if s not in coded:
            arguments.states[s][i].copy_(torch.where(finite, values[state.name], 0.0))
            continue
        new = torch.where(finite, values[state.name], 0.0)
        codes, scales = quantize_blockwise(new, state.codebook, None, arguments.block_size)
        arguments.states[s][i].copy_(codes)
        arguments.scales[s][i].copy_(scales)


def _fold_halves(x: Tensor) -> Tensor:
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


# -- the 24-bit master copy of a bfloat16 parameter -------------------------------------------------------------------


def join_master(p: Tensor, remainder: Tensor) -> Tensor:
    """float32 whose upper 24 bits are the bfloat16 p's, followed by eight zeros, plus the int8 remainder."""
    return ((p.view(torch.int16).int() << 16) + (remainder.int() << 8)).view(torch.float32)


def split_master(x: Tensor, p: Tensor, remainder: Tensor) -> None:
    """Store float32 x as bfloat16 p, the nearest, and int8 remainder: x rounded to 24 bits, ties to even.

    Where x is not finite the remainder is zero.
    """
    bits = x.view(torch.int32).long()
    master = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
    upper = (master + 0x80) >> 8
    finite = x.isfinite()
    p.copy_(torch.where(finite, upper.to(torch.int16).view(torch.bfloat16), x.to(torch.bfloat16)))
    remainder.copy_(torch.where(finite, master - (upper << 8), 0))
