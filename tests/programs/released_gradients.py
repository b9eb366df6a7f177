"""Gradient release under FSDP2, on two gloo ranks of one machine: exits with 0 where it equals the ordinary step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.ranks import fork, join
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowbit_lightning import optim

RANKS = 2


def train(kind: str, release: bool) -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 129), nn.GELU(), nn.Linear(129, 64))
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    optimizer = getattr(optim, kind)(model.parameters())
    if release:
        optim.release_gradients(model, optimizer)
    losses = []
    for i in range(4):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(10 * i + dist.get_rank()))
        loss = (model(x) - x).square().mean()
        loss.backward()
        assert all((p.grad is None) == release for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.full_tensor() for p in model.parameters()]


def rank(number: int, folder: Path) -> None:
    join(number, RANKS, folder / "store")
    for kind in ("AdamW", "LAMB"):
        plain, released = train(kind, False), train(kind, True)
        assert plain[0] == released[0], f"{kind}: losses {plain[0]} and {released[0]}"
        assert all(torch.equal(a, b) for a, b in zip(plain[1], released[1], strict=True)), f"{kind}: parameters"
    dist.destroy_process_group()


if __name__ == "__main__":
    fork(rank, (Path(sys.argv[1]),), RANKS)
