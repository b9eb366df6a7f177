"""The factors of a step for unscaling, clipping and skipping: three numbers on the device, which the kernel reads
there.

Nothing here waits for the device. The gradients are read once for each norm, and never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_lightning.state import shards

_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s, added to the norm


class Factors(NamedTuple):
    """0-d float32 tensors. Gradients are multiplied by ``unscale`` and ``clip``. The step is skipped unless ``skip`` is
    0."""

    unscale: Tensor | None = None
    clip: Tensor | None = None
    skip: Tensor | None = None


class Asked(NamedTuple):
    """What a GradScaler and ``clip_next_step`` ask of a step.

    ``grad_scale``: the factor that gradients were multiplied by. ``found_inf``: the step is skipped if it is not 0; no
    tensor if gradients were not checked. A GradScaler sets both. ``max_norm``: the largest allowed 2-norm of all
    unscaled gradients, taken as one vector.
    """

    grad_scale: Tensor | None = None
    found_inf: Any = None
    max_norm: float | None = None


def factors(params: Sequence[Tensor], grads: Sequence[Tensor], asked: Asked, skip_nonfinite: bool) -> Factors:
    """The factors of a step, on the device of the first parameter. With sharded parameters a collective.

    ``grads``: this rank's parts of the gradients of ``params``. ``skip_nonfinite``: skip a step if a gradient is not
    finite.
    """
    grad_scale, found_inf, max_norm = asked
    if not params:
        return Factors()
    device = shards.local(params[0]).device
    unscale = clip = skip = None
    if grad_scale is not None:
        unscale = grad_scale.to(device).double().reciprocal().float().reshape(())
    if max_norm is not None:
        norm = _norm(params, grads, device) * (1.0 if unscale is None else unscale)
        clip = (max_norm / (norm + _EPS)).clamp(max=1.0).float()
    if isinstance(found_inf, Tensor):
        skip = found_inf.to(device, torch.float32).reshape(())
    if skip_nonfinite:
        flag = _any_nonfinite(params, grads, device)
        skip = flag if skip is None else torch.maximum(skip, flag)
    return Factors(unscale, clip, skip)


def _norm(params: Sequence[Tensor], grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """The 2-norm of all gradients on all ranks: one float64."""
    zero = torch.zeros((), dtype=torch.float32, device=device)
    norms = _norms(grads, 2.0, device)
    squares = torch.stack([norms.get(i, zero) for i in range(len(grads))]).double().square()
    return shards.sum_over_shards(params, squares).sum().sqrt()


def _any_nonfinite(params: Sequence[Tensor], grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """One float32: 1 if any gradient on any rank is not finite, otherwise 0."""
    flag = torch.zeros((), dtype=torch.float32, device=device)
    norms = _norms(grads, float("inf"), device)
    if norms:  # a rank without any rows still takes part in the collective below
        flag = 1.0 - torch.isfinite(torch.stack([*norms.values()])).all().float()
    return shards.any_rank(params, flag)


def _norms(grads: Sequence[Tensor], order: float, device: torch.device) -> dict[int, Tensor]:
    """The float32 norm of each gradient that is not empty, by its index. Gradients of one device and dtype take one
    call."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        if grad.numel():
            alike.setdefault((grad.device, grad.dtype), []).append(i)
    result: dict[int, Tensor] = {}
    for indices in alike.values():
        norms = torch._foreach_norm([grads[i] for i in indices], order, dtype=torch.float32)
        result.update((i, norm.to(device)) for i, norm in zip(indices, norms, strict=True))
    return result
