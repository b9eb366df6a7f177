"""Parameters, gradients and comparisons that the optimizers' tests share."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lowbit_lightning import kernels, optim

# Every optimizer, with options that give it all its states.
FAMILY: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adagrad": {},
    "Lion": {},
    "LAMB": {},
    "LARS": {},
    "AdEMAMix": {"t_alpha": 5, "t_beta3": 5},
}


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def twins(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def spread(p: Tensor) -> Tensor:
    """A gradient whose elements spread over some decades."""
    return (torch.randn(p.shape) * torch.exp(2 * torch.randn(p.shape))).to(p.dtype)


def values(params: list[Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def decoded(optimizer: optim.LowBitOptimizer, p: Parameter, name: str, codebook: str) -> Tensor:
    state = optimizer.state[p]
    return kernels.dequantize_blockwise(state[f"{name}_codes"], state[f"{name}_scales"], codebook)


def ulp(x: Tensor) -> Tensor:
    """The distance to the next float32."""
    x = x.abs()
    return torch.nextafter(x, torch.full_like(x, torch.inf)) - x


def step(optimizer: torch.optim.Optimizer, params: list[Parameter], seed: int = 0) -> None:
    """A step with gradients that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


COPIES = ("deepcopy", "pickle", "torch.save")


def copied(x: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(x)
    if how == "pickle":
        return pickle.loads(pickle.dumps(x))
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def updates_beside_a_large_channel(
    ours: Callable[..., Any], theirs: Callable[..., Any], rows: int, steps: int
) -> Tensor:
    """Norm of each input channel's update over theirs, [steps, channels], where one has 1000 times larger gradients: a
    small second moment that is rounded to zero makes its channel's updates tens of times too large."""
    (p,) = parameters((rows, 512))
    (q,) = twins([p])
    a, b = ours([p]), theirs([q])
    ratios = []
    for _ in range(steps):
        before = p.detach().clone(), q.detach().clone()
        p.grad = torch.randn(rows, 512)
        p.grad[:, 7] *= 1000
        q.grad = p.grad.clone()
        a.step()
        b.step()
        ratios.append((p.detach() - before[0]).norm(dim=0) / (q.detach() - before[1]).norm(dim=0))
    return torch.stack(ratios)


def close(ours: list[Parameter], theirs: list[Parameter], tolerance: float = 1e-6) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert (p.detach() - q.detach()).norm() <= tolerance * q.detach().norm()
