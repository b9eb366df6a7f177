"""What a training step holds in memory at its peak, found by running it on tensors without storage.

The forward and the backward run in torch's ``FakeTensorMode``: shapes, dtypes and autograd are real, but there are no
values. A dispatch mode sees each new tensor, and weak references see when its storage is freed. So the sum of live
storage is known at every moment of the step. Tensors that autograd saves are counted exactly: views once, int8 forms of
inputs, autocast's copies of weights, and what activation checkpointing frees. Temporary memory inside an op is not
seen.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from lowbit_lightning.memory.batch import Batch, described
from lowbit_lightning.memory.loss import Step, own_step, scalar_in, sum_of


@dataclass(frozen=True)
class Reduction:
    """Gradients that become shards together: parameter's name -> shape of the shard; ``bytes`` for the way."""

    shards: Mapping[str, tuple[int, ...]]
    bytes: int


class _Live(TorchDispatchMode):
    """Counts the bytes of all live storages that are created in it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(x for x in tree_leaves(out) if isinstance(x, Tensor))
        return out

    def note(self, tensors: Iterable[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in self._known:
                self._follow(storage, storage._cdata, storage.nbytes())

    def _follow(self, storage: torch.UntypedStorage, key: int, size: int) -> None:
        def gone(_: Any) -> None:
            del self._known[key]
            self.bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.passes(0)

    def passes(self, size: int) -> None:
        """Count ``size`` more bytes for a moment."""
        self.peak = max(self.peak, self.bytes + size)


class Measured(NamedTuple):
    """``peak``: bytes at the peak of a step. ``loss``: what gave it: "step", a name of ``loss.own_step``, or "sum of
    outputs". ``order``: names of the parameters as their gradients came, or the shards of these."""

    peak: int
    loss: str
    order: tuple[str, ...]


class NoLossError(ValueError):
    """There is no loss to run a backward from."""


def measure(
    model: nn.Module,
    batch: Batch,
    step: Step | None,
    *,
    parameter_dtype: torch.dtype | None,
    input_dtype: torch.dtype | None,
    autocast: torch.dtype | None,
    checkpointed: list[str],
    keep_gradients: bool,
    reductions: Iterable[Reduction],
) -> Measured:
    """Bytes beside parameters and buffers at the peak of a step, gradients included where they are kept.

    Args:
        batch: a tensor, a tuple of positional or a dict of keyword arguments; only shapes and dtypes matter. A
            LightningModule's ``training_step`` gets it as it is.
        step: None: the model's own loss (``loss.own_step``).
        parameter_dtype, input_dtype: dtypes to which floating tensors are cast first, or None. autocast: its dtype, or
            None.
        checkpointed: names of modules that are recomputed in the backward.
        keep_gradients: False: each gradient, or shard of one, is freed as soon as it is complete. reductions: which
            gradients become shards.

    Raises:
        ValueError: for a step that needs values, or returns no loss; the error names the batch.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _twin(model, fakes, parameter_dtype)
    for name in checkpointed:
        module = twin.get_submodule(name)
        module.forward = _recomputed(module.forward)  # type: ignore[method-assign]
    twin.train()
    fake_batch = tree_map(lambda x: _fake(x, input_dtype, fakes) if isinstance(x, Tensor) else x, batch)
    live = _Live()
    live.ignore((*twin.parameters(), *twin.buffers()))
    order = _follow_gradients(twin, live, keep_gradients, list(reductions))
    cast = torch.autocast("cpu", autocast) if autocast else nullcontext()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), fakes:
            warnings.simplefilter("ignore")  # LightningModule.log misses its trainer
            with cast:
                name, own = ("step", step) if step else own_step(twin, fake_batch)
            with live:
                name = _run(twin, fake_batch, name, own, live, cast)
        return Measured(live.peak, name, tuple(order))
    except NoLossError:
        raise
    except Exception as error:  # whatever the model's own code raises, where tensors have no values
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"batch={described(batch)} could not be run without values: {type(error).__name__}: {said}; give "
            "shapes and dtypes as in training (of token numbers int64), a step(model, batch) that returns the loss and "
            "reads no values (.item()) where the model's own does, or no batch: activations are then left out"
        ) from error


def _run(twin: nn.Module, batch: Batch, name: str, step: Step, live: _Live, cast: AbstractContextManager) -> str:
    live.note(x for x in tree_leaves(batch) if isinstance(x, Tensor))
    with cast:
        out = step(twin, batch)
        loss = scalar_in(out)
        if loss is None and name != "step":
            name, loss = "sum of outputs", sum_of(out)
    if loss is None:
        raise NoLossError(f"step must return a scalar loss that requires a gradient, got {out!r}")
    if name != "training_step":  # Lightning keeps what it returns beside the loss until the backward is over
        del out
    loss.backward()
    return name


def _follow_gradients(twin: nn.Module, live: _Live, keep: bool, reductions: list[Reduction]) -> list[str]:
    """Free gradients, or shards of them, unless they are to be kept. The names come into the list as they arrive."""
    named, order = dict(twin.named_parameters()), list[str]()
    names = {p: name for name, p in named.items()}
    if not reductions:
        _after_each(named.values(), lambda p: order.append(names[p]))
        if not keep:
            _after_each(named.values(), lambda p: setattr(p, "grad", None))
    for reduction in reductions:
        _reduce(named, reduction, live, keep, order)
    return order


def _after_each(params: Iterable[nn.Parameter], do: Callable[[nn.Parameter], None]) -> None:
    for p in params:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(do)  # type: ignore[arg-type]


def _reduce(
    named: dict[str, nn.Parameter], reduction: Reduction, live: _Live, keep_shards: bool, order: list[str]
) -> None:
    """When the last gradient of a group is complete, turn all of them into shards."""
    group = {named[name]: shape for name, shape in reduction.shards.items()}
    missing, shards = set(group), []

    def arrived(p: nn.Parameter) -> None:
        missing.discard(p)
        if not missing:
            live.passes(reduction.bytes)
            order.extend(reduction.shards)
            for other, shape in group.items():
                if keep_shards:
                    shards.append(other.new_empty(shape))
                other.grad = None

    _after_each(group, arrived)


def _fake(x: Tensor, dtype: torch.dtype | None, fakes: FakeTensorMode) -> Tensor:
    with fakes:  # on the CPU: autocast knows no meta device
        return torch.empty(x.shape, dtype=dtype if dtype and x.is_floating_point() else x.dtype, device="cpu")


def _twin(model: nn.Module, fakes: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the model whose parameters and buffers have no storage."""
    memo: dict[int, Any] = {id(buffer): _fake(buffer, None, fakes) for buffer in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(_fake(p, dtype, fakes), requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
