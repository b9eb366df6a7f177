"""The int8 forms of weights, made once in an optimizer step instead of in each forward and backward.

A weight changes only when its optimizer steps. Until then its two int8 forms (by rows for the forward, by columns for
the gradient of the input) serve the backward and all micro-batches of an accumulation window. They take 2 bytes per
element until the step.

When a form may be used again
-----------------------------
A form of a weight that has changed since would be a silently wrong result, and no single sign tells that a tensor has
changed: fused optimizers, ``.data`` and foreign kernels leave its version counter alone. So all of these must hold:

- The weight belongs to an optimizer that has been seen to step, and whose step was never captured into a CUDA graph:
  a replay is not seen. What else holds weights changes them without notice:
  FSDP2's unsharded parameters are filled anew under an unchanged version (and would stay in memory as int8 where they
  are meant to be freed); a training loop without a ``torch.optim.Optimizer`` may write through ``.data``.
- Since the form was made no optimizer has stepped, and no Int8Linear has loaded a state, been moved or cast, or been
  switched between training and evaluation. Each of these empties the store (``invalidate``).
- The tensor object, its memory and its version counter are those of then.
- On CUDA: the stream is the same, and nothing is being captured into a graph, whose replays would not look again.

What remains is a write through ``weight.data`` between two passes in training mode, within one step: call
``invalidate()`` after it. Swapping averaged weights in for evaluation needs no such call.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from lowbit_lightning import kernels

Form = tuple[Tensor, Tensor]
"""An int8 matrix and the float32 scales of its rows."""


@dataclass
class _Forms:
    alias: Tensor  # holds the weight's memory, so that no other tensor gets its address meanwhile
    version: int
    stream: int
    rows: Form | None = None
    columns: Form | None = None

    def fit(self, weight: Tensor) -> bool:
        same = self.alias.data_ptr() == weight.data_ptr() and self.alias.shape == weight.shape
        return same and self.version == weight._version and self.stream == _stream(weight)


_lock = threading.Lock()
_store = WeakIdKeyDictionary()  # weight -> _Forms
_generation = 0  # rises whenever the store is emptied
_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those that have stepped
_captured: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # whose steps are replayed from CUDA graphs, unseen
_owned: tuple[int, set[int]] | None = None  # how many they were, and the ids of their parameters


def invalidate() -> None:
    """Forget the int8 forms of all weights: they are quantised again when next needed.

    Called by optimizer steps, ``load_state_dict``, ``.to()``, ``train()`` and ``eval()``. Only a write through
    ``weight.data`` between two training passes of one optimizer step has to call it by hand.
    """
    global _generation, _owned
    with _lock:
        _generation += 1
        _owned = None
        _store.clear()


def rows(weight: Tensor, reuse: bool, columns_too: bool) -> Form:
    """The form for the forward: int8 ``[N, K]``, scales ``[N]``, of ``weight [N, K]``.

    ``reuse``: take it from the store, or leave it there. ``columns_too``: the backward will ask for ``columns``.
    """
    forms, generation = _look_up(weight) if reuse else (None, 0)
    if forms is None:
        return kernels.quantize_rowwise(weight)
    if forms.rows is None:
        if columns_too and forms.columns is None:
            codes, scales, *columns = kernels.quantize_both(weight)
            forms.columns = columns[0], columns[1]
            forms.rows = codes, scales
        else:
            forms.rows = kernels.quantize_rowwise(weight)
        _keep(weight, forms, generation)
    return forms.rows


def columns(weight: Tensor, reuse: bool) -> Form:
    """The form for the gradient of the input: int8 ``[K, N]``, scales ``[K]``, of ``weight [N, K]``."""
    forms, generation = _look_up(weight) if reuse else (None, 0)
    if forms is None:
        return kernels.quantize_colwise(weight)
    if forms.columns is None:
        forms.columns = kernels.quantize_colwise(weight)
        _keep(weight, forms, generation)
    return forms.columns


def _look_up(weight: Tensor) -> tuple[_Forms | None, int]:
    """What is stored of the weight, or an empty entry to fill; None where nothing may be stored."""
    _watch_optimizers()
    with _lock:
        if not _is_owned(weight) or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None, _generation
        forms = _store.get(weight)
        if forms is None or not forms.fit(weight):
            forms = _Forms(weight.detach(), weight._version, _stream(weight))
        return forms, _generation


def _keep(weight: Tensor, forms: _Forms, generation: int) -> None:
    with _lock:
        if generation == _generation and forms.fit(weight):  # nothing happened while it was quantised
            _store[weight] = forms


def _is_owned(weight: Tensor) -> bool:
    global _owned
    if _owned is None or _owned[0] != len(_optimizers):  # an optimizer that is gone owns nothing
        groups = [group for optimizer in _optimizers for group in optimizer.param_groups]
        _owned = len(_optimizers), {id(p) for group in groups for p in group["params"]}
    return id(weight) in _owned[1]


def _stream(weight: Tensor) -> int:
    return torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    with _lock:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            _captured.add(optimizer)
        if optimizer in _captured:
            _optimizers.discard(optimizer)
        else:
            _optimizers.add(optimizer)
    invalidate()
