"""The entrance for all ops: ``declare`` makes an op known to torch, ``run`` runs it on a backend and counts it.

To add an op, write

1. its contract, a method in ``backend.py``, which also lists its name;
2. its declaration, beside the public function that checks the arguments::

       _rowwise = declare(
           "quantize_rowwise(Tensor x, SymInt? seed) -> (Tensor, Tensor)",
           fake=lambda x, seed: (torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)),
       )

3. its function in ``reference/``, and a launcher of the same name and signature in each other backend, with its source
   in ``src/``.

An op is opaque to ``torch.compile`` and to autograd. ``declare(..., setup_context=, backward=)`` makes one
differentiable. ``setup_context(ctx, inputs, output)`` saves what ``backward(ctx, *grads)`` needs. It may save only
inputs and results, so intermediate values for the backward must be additional results. ``backward`` returns a gradient,
or None, for each input. It may call other ops; if these have no derivative, give them a ``backward`` that raises.
Callers handle forward-mode AD, ``vmap`` and derivatives of gradients themselves (``is_transformed``).
Ops of other packages, such as ``layers/ops.py``, are declared by the same function, and need no contract.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd import forward_ad

from lowbit_lightning.kernels.backend import BACKENDS, OPS
from lowbit_lightning.kernels.compile.errors import Unavailable

_library = torch.library.Library("lowbit_lightning", "DEF")
_calls: Counter[tuple[str, str]] = Counter()
_forced: list[str] = []
_chosen: dict[str, str] = {}  # device type -> backend


def declare(
    schema: str,
    *,
    fake: Callable[..., Any],
    implementation: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> OpOverload:
    """Define ``torch.ops.lowbit_lightning.NAME``, and return the overload, which can be called.

    Args:
        schema: ``"NAME(arguments) -> results"`` in torch's schema language, with marks for mutated arguments. It is
            given because torch cannot infer it from ``Tensor | None``.
        fake: returns results of the right shapes, dtypes and device without computing.
        implementation: what the op does. By default it runs on the backend of its first argument's device.
        setup_context, backward: the arguments of ``torch.library.register_autograd``.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.lowbit_lightning, name).default
    _library.impl(name, implementation or _on_backend(name), "CompositeExplicitAutograd")
    qualified = f"lowbit_lightning::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    return op


def _on_backend(op: str) -> Callable[..., Any]:
    def implementation(*arguments: Any) -> Any:
        near = contiguous(*arguments)
        return run(op, near[0].device, *near)

    return implementation


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is active.

    If an op has only a ``backward``, torch silently takes its tangent to be zero under both. So callers of such an op
    ask here first, and use other ops if the answer is True.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unwatched(*tensors: torch.Tensor | None) -> bool:
    """Whether torch's dispatcher is not needed for an op on these tensors: there is no gradient, tracing, mode,
    transform or subclass.

    Then the implementation may be called as a plain function. The dispatcher takes 15 to 45 microseconds, as long as a
    small product.
    """
    if torch.compiler.is_compiling() or _watchers():
        return False
    gradients = torch.is_grad_enabled()
    for t in tensors:  # noqa: SIM110  (a generator would take as long as the rest)
        if t is not None and (type(t) not in _PLAIN or (gradients and t.requires_grad)):
            return False
    return True


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _watchers() -> bool:
    """Whether a dispatch mode, a function mode or a transform is active."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or is_transformed())


def contiguous(*arguments: Any) -> list[Any]:
    """The arguments of an op; its tensors are contiguous."""
    return [x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments]


def run(op: str, device: torch.device, *arguments: Any) -> Any:
    """Run the function ``op`` of the backend for ``device``, and count the call. All tensors must be contiguous."""
    name = serving(device)
    try:
        result = function(name, op)(*arguments)
    except Unavailable as error:  # it is raised before the op has changed anything
        if _forced:
            raise
        name = _chosen[device.type] = _warned_reference(device.type, str(error))
        result = function(name, op)(*arguments)
    _calls[op, name] += 1
    return result


def serving(device: torch.device) -> str:
    """The backend that runs ops on a device now."""
    return _forced[-1] if _forced else backend_of(device.type)


@cache
def function(backend: str, op: str) -> Callable[..., Any]:
    """The function that a backend runs for an op."""
    return getattr(import_module(f"lowbit_lightning.kernels.{backend}.{OPS[op]}"), op)


def engine(op: str, device: torch.device) -> str:
    """The instructions or the kernel by which a device runs an op, in words; "" where its backend knows only one way.

    It compiles what decides.
    """
    engines = getattr(import_module(function(backend_of(device.type), op).__module__), "engines", None)
    return "" if engines is None else engines(device).get(op, "")


# -- the choice of a backend -----------------------------------------------------------------------------------------


def calls() -> dict[tuple[str, str], int]:
    """How often each op ran on each backend since the last ``reset_calls``: ``{("int8_matmul", "cpu"): 12}``."""
    return dict(_calls)


def reset_calls() -> None:
    """Set all counts of ``calls`` to zero."""
    _calls.clear()


@contextmanager
def uncounted() -> Iterator[None]:
    """What runs inside the block does not count in ``calls``."""
    before = _calls.copy()
    try:
        yield
    finally:
        _calls.clear()
        _calls.update(before)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on the backend ``name`` ("reference", "cpu" or "cuda"), for any device."""
    load(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.remove(name)


@cache
def load(name: str) -> None:
    """Raise ValueError for an unknown backend, and CompilerNotFound for one that cannot run here."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    import_module(f"lowbit_lightning.kernels.{name}").load()


def backend_of(device_type: str) -> str:
    """The backend that serves a type of device, chosen when it is first asked for."""
    if device_type not in _chosen:
        _chosen[device_type] = _choose(device_type)
    return _chosen[device_type]


def _choose(device_type: str) -> str:
    asked = os.environ.get("LOWBIT_LIGHTNING_BACKEND") or None
    if asked is None and device_type not in BACKENDS:
        return _warned_reference(device_type, f"there is no backend for device type {device_type!r}")
    try:
        load(asked or device_type)
    except Unavailable as error:
        return _warned_reference(device_type, str(error))
    return asked or device_type


def _warned_reference(device_type: str, reason: str) -> str:
    warnings.warn(
        f"lowbit_lightning uses its plain-torch reference on {device_type}, which is many times slower: {reason}",
        stacklevel=2,
    )
    return "reference"
