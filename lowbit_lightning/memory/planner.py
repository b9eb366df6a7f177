"""``plan``: computes bytes per device from a model's shapes and a run's settings."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lowbit_lightning import convert
from lowbit_lightning.memory import states
from lowbit_lightning.memory.advice import advise
from lowbit_lightning.memory.copies import Copies, copies_of
from lowbit_lightning.memory.result import Plan
from lowbit_lightning.memory.run import Run
from lowbit_lightning.memory.step import Measured, measure
from lowbit_lightning.sharding import first_share, repeated_blocks


def plan(model: nn.Module, run: Run | None = None, **options: Any) -> Plan:
    """Bytes per device, before anything is allocated.

    Args:
        model: on any device, including the meta device. Only its shapes and dtypes are read; it is not changed.
        run: the run to plan. options: options of ``Run`` by name, instead of ``run`` or to change it, and any other
            argument of the optimizer: ``plan(model, world_size=8, precision="int8-mixed", momentum=0.9)``.

    Raises:
        ValueError, TypeError: for an option that is out of range; the error names it.
    """
    run = Run.of(**options) if run is None else run.but(**options)
    _check_shapes(model)
    return _plan(model, run)


def _check_shapes(model: nn.Module) -> None:
    if next(model.parameters(), None) is None:
        raise ValueError(f"model must have parameters; {type(model).__name__} has none")
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"parameter {name!r} of the model has no shape yet: call the model with a batch first")


def _plan(model: nn.Module, run: Run) -> Plan:
    twin = _twin(model, run)
    params = list(twin.parameters())
    local = [_meta(first_share(tuple(p.shape), run.ranks), p.dtype) for p in params]
    trained = [(whole, own, part) for whole, own, part in zip(params, model.parameters(), local, strict=True)]
    parts = {own: part for whole, own, part in trained if whole.requires_grad}
    optimizer = states.make(run.optimizer, run.bits, parts, run.sharded, run.optimizer_options, run.paging)
    if run.release_gradients:
        states.check_release(optimizer)
    copies = copies_of(twin, run)
    gradients = _gradients(run, [part.nbytes for part in parts.values()], twin, copies)
    activations, measured = _activations(twin, run, copies, gradients)
    in_order = {}
    if run.release_gradients and measured:  # the pages lie in the order in which parameters are updated
        own = dict(zip((name for name, _ in twin.named_parameters()), model.parameters(), strict=True))
        in_order = {parts[own[name]]: place for place, name in enumerate(measured.order)}
    state_parts, paged_out = states.count(optimizer, parts, run.ranks, in_order)
    return Plan(
        parameters=sum(part.nbytes for part in local),
        gradients=gradients,
        states=sum(state_parts.values()),
        buffers=sum(buffer.nbytes for buffer in twin.buffers()),
        gathered=copies.gathered,
        reduction=copies.reduction,
        activations=activations,
        paged_out=paged_out,
        state_parts=state_parts,
        communication=copies.communication,
        settings={**run.shown(), **({"loss": measured.loss} if measured else {})},
        margin=run.margin,
        _advise=lambda memory: advise(model, run, lambda changed: _plan(model, changed), memory),
    )


def _twin(model: nn.Module, run: Run) -> nn.Module:
    """The model of the run on the meta device: in the precision's dtype, with its int8 layers."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = _meta(tuple(p.shape), run.dtype_of(p), p.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=run.dtype_of(buffer), device="meta")
    twin = copy.deepcopy(model, memo)
    if run.precision == "int8-mixed":
        convert.swap_linears(twin, **run.int8)
    return twin


def _meta(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool = True) -> nn.Parameter:
    trains = requires_grad and dtype.is_floating_point
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=trains)


def _gradients(run: Run, sizes: list[int], twin: nn.Module, copies: Copies) -> int:
    """Bytes of all gradients. If gradients are released, bytes of those that exist at one time: one parameter's, or
    under FSDP2 the shards of one reduction."""
    if not run.release_gradients:
        return sum(sizes)
    if not run.sharded:
        return max(sizes, default=0)
    item = {name: p.dtype.itemsize for name, p in twin.named_parameters()}
    groups = [sum(prod(shape) * item[name] for name, shape in r.shards.items()) for r in copies.reductions]
    return max(groups, default=0)


def _activations(twin: nn.Module, run: Run, copies: Copies, gradients: int) -> tuple[int | None, Measured | None]:
    """Bytes of activations, and the measurement that gave them; None without a batch."""
    if run.batch is None:
        return None, None
    once = run.accumulate == 1
    measured = measure(
        twin,
        run.batch,
        run.step,
        parameter_dtype=run.autocast if run.sharded else None,
        input_dtype=run.true_dtype,
        autocast=run.autocast,
        checkpointed=repeated_blocks(twin) if run.activation_checkpointing else [],
        keep_gradients=once and not run.release_gradients,
        reductions=copies.reductions if once else (),
    )
    counted = gradients + (copies.reduction if run.sharded else 0)  # the step run here had them too
    return max(0, measured.peak - counted) if once else measured.peak, measured
