"""``plan``: a model's shapes and a run's settings in, bytes per device out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowbit_lightning import convert
from lowbit_lightning.layers import Int8Linear
from lowbit_lightning.memory import states
from lowbit_lightning.memory.advice import advise
from lowbit_lightning.memory.copies import Copies, copies_of
from lowbit_lightning.memory.result import Plan
from lowbit_lightning.memory.settings import Precision, Settings, Strategy
from lowbit_lightning.memory.step import Step, measure
from lowbit_lightning.sharding import Policy, first_share, repeated_blocks


def plan(
    model: nn.Module,
    *,
    world_size: int = 1,
    strategy: Strategy = "single",
    precision: Precision = "32-true",
    optimizer: states.Kind = "AdamW",
    bits: int | None = 8,
    batch: Any = None,
    step: Step | None = None,
    accumulate: int = 1,
    reshard_after_forward: bool = True,
    replicas: int = 1,
    policy: Policy | None = None,
    activation_checkpointing: bool = False,
    int8: Mapping[str, Any] | None = None,
    all_gather: Literal["high", "int8"] = "high",
    paged: bool | Literal["disk"] = False,
    resident: int | str = 0,
    **options: Any,
) -> Plan:
    """Bytes per device, before anything is allocated.

    Args:
        model: on any device, the meta device too; only shapes and dtypes are looked at, and nothing is changed.
        world_size: the ranks. strategy: "single", "ddp", or "sharded" (``strategy="lowbit_sharded"``: FSDP2).
        precision: Lightning's string. "32-true" leaves the parameters in their own dtypes, as Lightning does.
        optimizer: the name of one of ``lowbit_lightning.optim``, with ``bits``; a class; or an instance over the
            model's parameters, which has its own settings. Under "sharded" one of torch.optim becomes its twin, with
            states of ``bits``, as the strategy does it. ``bits=None``: names are torch.optim's, nothing is converted.
        options: of the optimizer: ``min_size``, ``block_size``, ``master``, ``momentum``, ...
        batch: for activations: a tensor, a tuple or a dict of arguments; only shapes and dtypes matter.
        step: ``step(model, batch) -> loss``. None: the model is called, and the loss is the sum of what it returns.
        accumulate: micro-batches in an optimizer step; ``batch`` is one of them.
        reshard_after_forward, replicas, policy, all_gather: as for ``strategies.ShardedStrategy``.
        activation_checkpointing: the repeated blocks are recomputed in the backward.
        int8: arguments of ``convert.swap_linears``, for "int8-mixed".
        paged, resident: of the optimizer's states, as for the optimizers here (an instance has its own).

    Raises:
        ValueError, TypeError: an argument that is out of range, naming it.
    """
    settings = Settings(
        *(world_size, strategy, precision, optimizer, bits, batch, step, accumulate, reshard_after_forward),
        *(replicas, policy, activation_checkpointing, int8 or {}, all_gather, paged, resident, options),
    )
    settings.check()
    _check_shapes(model)
    return _plan(model, settings)


def _check_shapes(model: nn.Module) -> None:
    if next(model.parameters(), None) is None:
        raise ValueError(f"model must have parameters; {type(model).__name__} has none")
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"parameter {name!r} of the model has no shape yet: call the model with a batch first")


def _plan(model: nn.Module, settings: Settings) -> Plan:
    twin = _twin(model, settings)
    params = list(twin.parameters())
    local = [_meta(first_share(tuple(p.shape), settings.ranks), p.dtype) for p in params]
    trained = [(whole, own, part) for whole, own, part in zip(params, model.parameters(), local, strict=True)]
    parts = {own: part for whole, own, part in trained if whole.requires_grad}
    paging = {"paged": settings.paged, "resident": settings.resident} if settings.paged else {}
    optimizer = states.make(settings.optimizer, settings.bits, parts, settings.sharded, dict(settings.options), paging)
    state_parts, paged_out = states.count(optimizer, parts, settings.ranks)
    copies = copies_of(twin, settings)
    gradients = sum(part.nbytes for part in parts.values())
    return Plan(
        parameters=sum(part.nbytes for part in local),
        gradients=gradients,
        states=sum(state_parts.values()),
        buffers=sum(buffer.nbytes for buffer in twin.buffers()),
        gathered=copies.gathered,
        reduction=copies.reduction,
        int8_weights=0 if settings.sharded else _int8_weights(twin),
        activations=_activations(twin, settings, copies, gradients),
        paged_out=paged_out,
        state_parts=state_parts,
        communication=copies.communication,
        settings=settings.shown(),
        _advise=lambda memory: advise(model, settings, lambda changed: _plan(model, changed).total, memory),
    )


def _twin(model: nn.Module, settings: Settings) -> nn.Module:
    """The model of the run on the meta device: in the precision's dtype, with its int8 layers."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = _meta(tuple(p.shape), settings.dtype_of(p), p.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=settings.dtype_of(buffer), device="meta")
    twin = copy.deepcopy(model, memo)
    if settings.precision == "int8-mixed":
        convert.swap_linears(twin, **settings.int8)
    return twin


def _meta(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool = True) -> nn.Parameter:
    trains = requires_grad and dtype.is_floating_point
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=trains)


def _int8_weights(twin: nn.Module) -> int:
    """Forms by rows for the forward, by columns for the gradient of the input, each with a scale per row of its own.

    (FSDP2's unsharded weights are no optimizer's: nothing is kept of them.)
    """
    forms: dict[Tensor, int] = {}
    for layer in twin.modules():
        if isinstance(layer, Int8Linear) and layer.products.cache_weights and layer.weight.requires_grad:
            rows, columns = layer.weight.shape
            kept = [n for n, name in ((rows, "forward"), (columns, "grad_input")) if name in layer.products.int8]
            forms[layer.weight] = sum(rows * columns + 4 * scales for scales in kept)
    return sum(forms.values())


def _activations(twin: nn.Module, settings: Settings, copies: Copies, gradients: int) -> int | None:
    if settings.batch is None:
        return None
    once = settings.accumulate == 1
    peak = measure(
        twin,
        settings.batch,
        settings.step,
        parameter_dtype=settings.autocast if settings.sharded else None,
        input_dtype=settings.true_dtype,
        autocast=settings.autocast,
        checkpointed=repeated_blocks(twin) if settings.activation_checkpointing else [],
        keep_gradients=once,
        reductions=copies.reductions if once else (),
    )
    counted = gradients + (copies.reduction if settings.sharded else 0)  # the step run here had them too
    return max(0, peak - counted) if once else peak
