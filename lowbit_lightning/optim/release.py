"""Gradient release: the update runs inside backward, and the gradient is freed immediately.

A parameter's gradient is complete when autograd has accumulated it. Updating there and then means that only one
gradient is alive at a time, instead of all of them (Lv et al., 2023, "Full Parameter Fine-tuning ... with Limited
Resources").
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lowbit_lightning.optim.base import LowBitOptimizer


class ReleasedGradients:
    """What ``release_gradients`` returns; ``remove()`` goes back to ordinary steps."""

    def __init__(self, optimizer: LowBitOptimizer, handles: list[RemovableHandle]) -> None:
        self._optimizer, self._handles = optimizer, handles

    def remove(self) -> None:
        """Remove the hooks; the optimizer steps as before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._optimizer.releases_gradients = False


def release_gradients(model: nn.Module, optimizer: LowBitOptimizer) -> ReleasedGradients:
    """Update each parameter during backward, as soon as its gradient is complete, and free the gradient.

    The training loop stays as it is: ``backward()``, ``optimizer.step()`` (which finds nothing left to do),
    ``zero_grad()``. The result is bit-identical to the ordinary step. Features that need all gradients at once cannot
    work and are refused: accumulation over several backward passes, clipping by norm, ``skip_nonfinite``, a GradScaler,
    and ranks that average plain gradients after backward (DDP; FSDP2 averages before, and works).

    Args:
        model: a LightningModule is asked for its Trainer's clipping, accumulation and scaler; any other module is
            not used, and what its training loop does with gradients cannot be seen.
        optimizer: an optimizer of this package. Hooks are set on the parameters that need a gradient now; groups that
            are added later are updated by ``step()``.

    Raises:
        TypeError: for an optimizer of another package.
        ValueError: for a setting named above.
        RuntimeError: in backward, for a second gradient of a parameter before ``optimizer.step()``.
    """
    if not isinstance(optimizer, LowBitOptimizer):
        raise TypeError(
            f"optimizer must be one of lowbit_lightning.optim, got {type(optimizer).__name__}; see convert_"
        )
    if any(group["skip_nonfinite"] for group in optimizer.param_groups):
        raise ValueError(
            "skip_nonfinite=True looks at all gradients before any update: it does not work with release_gradients"
        )
    _check_trainer(getattr(model, "_trainer", None))
    _check_ranks(optimizer)
    released: set[Tensor] = set()
    places = {}
    ordinal = 0
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            places[p] = number, ordinal
            ordinal += 1

    def update(p: Tensor) -> None:
        if p in released:
            raise RuntimeError(
                "a parameter got a second gradient before optimizer.step(): accumulation does not work with "
                "release_gradients; use accumulate_grad_batches=1, or do not release"
            )
        released.add(p)
        number, ordinal = places[p]
        optimizer.step_parameter(p, optimizer.param_groups[number], ordinal)  # load_state_dict makes new groups
        p.grad = None

    def forget(*_: Any) -> None:
        any_released = bool(released)
        released.clear()
        if any_released:
            _check_step(optimizer)

    handles = [p.register_post_accumulate_grad_hook(update) for p in places if p.requires_grad]
    optimizer.releases_gradients = True
    return ReleasedGradients(optimizer, [*handles, optimizer.register_step_pre_hook(forget)])


def _check_trainer(trainer: Any) -> None:
    if trainer is None:
        return
    if getattr(trainer, "gradient_clip_val", None):
        raise ValueError(
            f"gradient_clip_val={trainer.gradient_clip_val} needs all gradients at once: it does not work "
            "with release_gradients"
        )
    if getattr(trainer, "accumulate_grad_batches", 1) != 1:
        raise ValueError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} keeps gradients: it does not work with "
            "release_gradients"
        )
    if getattr(getattr(trainer, "precision_plugin", None), "scaler", None) is not None:
        raise ValueError(
            "a GradScaler unscales all gradients before the step: it does not work with release_gradients; use bf16"
        )


def _check_step(optimizer: LowBitOptimizer) -> None:
    for name, given in (
        ("GradScaler", getattr(optimizer, "grad_scale", None)),
        ("clip_next_step", optimizer._max_norm),
    ):
        if given is not None:
            raise RuntimeError(
                f"gradients were released during backward, so that a {name} comes too late for them: parameters have "
                "been updated already; use bf16 and no clipping, or do not release"
            )


def _check_ranks(optimizer: LowBitOptimizer) -> None:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if any(not isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"with {dist.get_world_size()} ranks the gradients of plain parameters are averaged after backward, as DDP "
            "does: their release would update with this rank's part alone; shard the model with fully_shard"
        )
