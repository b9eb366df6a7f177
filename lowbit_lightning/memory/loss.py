"""How a model computes its loss. This decides what a backward needs, so a plan runs the loss of the training.

A LightningModule has a ``training_step``. A model of Transformers computes its loss itself if it gets ``labels``.
Neither library is imported: this module looks for the method, and for the argument of ``forward``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowbit_lightning.memory.batch import Batch

Step = Callable[[nn.Module, Batch], Any]
"""``step(model, batch) -> loss``, a scalar."""


def own_step(model: nn.Module, batch: Batch) -> tuple[str, Step]:
    """The name of the source of the loss, for a table, and the step that computes it. Calls the model if the shape of
    its labels must be found.

    - ``"training_step"``: a LightningModule's, for batch number 0.
    - ``"labels"``: the forward takes ``labels`` and the batch has none. Some are added, one for each row of logits.
    - ``"forward"``: the model is called with the batch.

    If they return a scalar, or a value that holds one as ``loss`` or as its first item, this is the loss. Anything else
    is summed, and the tensors that a loss would keep are not counted.
    """
    if callable(getattr(model, "training_step", None)):
        return "training_step", _training_step
    if not _takes_labels(model) or (isinstance(batch, Mapping) and "labels" in batch):
        return "forward", _call
    labels = _labels(model, batch)
    return ("forward", _call) if labels is None else ("labels", lambda model, batch: _call(model, batch, labels=labels))


def scalar_in(out: Any) -> Tensor | None:
    """The loss in what a step returned: the scalar, or that of ``out.loss``, ``out["loss"]`` or ``out[0]``."""
    if isinstance(out, Mapping):
        out = out.get("loss")
    elif not isinstance(out, Tensor):
        out = out[0] if isinstance(out, (tuple, list)) and out else getattr(out, "loss", None)
    return out if isinstance(out, Tensor) and out.numel() == 1 and out.requires_grad else None


def sum_of(out: Any) -> Tensor | None:
    """The sum of all tensors that require a gradient; None if there are none."""
    parts = [x.float().sum() for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
    return torch.stack(parts).sum() if parts else None


def _training_step(model: nn.Module, batch: Batch) -> Any:
    step: Any = model.training_step
    takes_index = "batch_idx" in inspect.signature(step).parameters or len(inspect.signature(step).parameters) > 1
    return step(batch, 0) if takes_index else step(batch)


def _call(model: nn.Module, batch: Batch, **more: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch, **more)
    return model(*batch, **more) if isinstance(batch, (tuple, list)) else model(batch, **more)


def _takes_labels(model: nn.Module) -> bool:
    return "labels" in inspect.signature(model.forward).parameters


def _labels(model: nn.Module, batch: Batch) -> Tensor | None:
    """A class for each row of the model's logits, or a number where a row has one element. Without logits (of a decoder
    that makes its inputs from labels) as the first integers of the batch; None where there are none either."""
    try:
        with torch.no_grad():
            out = _call(model, batch)
    except (RuntimeError, ValueError, TypeError):
        out = None
    logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim > 1:
        return logits.new_empty(logits.shape[:-1], dtype=torch.int64 if logits.shape[-1] > 1 else torch.float32)
    whole = (x for x in tree_leaves(batch) if isinstance(x, Tensor) and not x.is_floating_point())
    first = next(whole, None)
    return None if first is None else torch.empty_like(first, dtype=torch.int64)
