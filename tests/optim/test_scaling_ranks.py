"""Clipping and a GradScaler inside the step, with DTensors on three ranks.

Plain SGD at a rate of 1 subtracts the gradient itself, which float64 gives.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.on_ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from lowbit_lightning import optim

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")

RANKS = 3
SHAPES = ((33, 512), (2, 400), (1, 300), (70,))  # one rank holds no row of the second, two none of the third
PLACES = (Shard(0), Shard(0), Shard(0), Replicate())
SCALE = 1024.0


def build() -> tuple[list[Parameter], list[Tensor]]:
    """Sharded parameters, and whole ones in float64."""
    torch.manual_seed(0)
    whole = [torch.randn(shape) for shape in SHAPES]
    mesh = init_device_mesh("cpu", (RANKS,))
    params = [Parameter(distribute_tensor(x, mesh, [place])) for x, place in zip(whole, PLACES, strict=True)]
    return params, [x.double() for x in whole]


def set_gradients(params: list[Parameter], seed: int, bad_row: int | None = None) -> list[Tensor]:
    """Scaled gradients; returns the unscaled ones, whole, in float64."""
    generator = torch.Generator().manual_seed(seed)
    exact = []
    for i, p in enumerate(params):
        whole = torch.randn(p.shape, generator=generator)
        exact.append(whole.double())
        if i == 0 and bad_row is not None:
            whole[bad_row, 5] = torch.inf
        assert isinstance(p, DTensor)
        p.grad = distribute_tensor(whole * SCALE, p.device_mesh, p.placements)
    return exact


def check(params: list[Parameter], expected: list[Tensor], what: str) -> None:
    for i, (p, x) in enumerate(zip(params, expected, strict=True)):
        off = (p.full_tensor().double() - x).abs().max()  # type: ignore[attr-defined]
        assert off <= 1e-6, f"{what}: params[{i}] is off by {off:.1e}"


@on_ranks(RANKS)
def test_the_norm_is_that_of_all_ranks(folder: Path) -> None:
    params, expected = build()
    optimizer = optim.SGD(params, lr=1.0)
    exact = set_gradients(params, 1)
    norm = torch.stack([g.square().sum() for g in exact]).sum().sqrt()
    optimizer.clip_next_step(0.5)
    optimizer.grad_scale = torch.tensor(SCALE)  # type: ignore[attr-defined]
    optimizer.step()
    check(params, [x - g * (0.5 / (norm + 1e-6)) for x, g in zip(expected, exact, strict=True)], "clipping")


@on_ranks(RANKS)
def test_an_overflow_of_one_rank_skips_the_step_of_all(folder: Path) -> None:
    """Rows 0, 15 and 32 of 33 are on the first, second and third rank."""
    for row in (0, 15, 32):
        params, expected = build()
        optimizer = optim.SGD(params, lr=1.0, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.zeros(()))
        set_gradients(params, 1, bad_row=row)
        optimizer.clip_next_step(0.5)
        scaler.step(optimizer)
        scaler.update()
        check(params, expected, f"row {row} overflows")
        counts = {float(optimizer.state[p]["step"]) for p in params}
        assert counts == {0.0}, f"row {row} overflows: step counts {counts}"
        assert scaler.get_scale() == SCALE / 2, f"row {row} overflows: scale {scaler.get_scale()}"
