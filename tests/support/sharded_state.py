"""A small model under FSDP2, its optimizer's states whole and by name, and steps that depend on a number alone.

Gradients are whole tensors, so every number of ranks computes the same, to the bit wherever nothing is summed over
ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


class Net(nn.Module):
    """Odd shapes: no rank count divides them, and on three ranks one holds no row of ``pair`` or ``single``."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 301)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.wide = nn.Linear(301, 512, bias=False)
        self.back = nn.Linear(512, 301)  # 301 rows of 512
        self.norm = nn.LayerNorm(301)
        self.head = nn.Linear(301, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.convolution = nn.Conv2d(16, 33, 3)
        self.small = nn.Linear(77, 5)
        self.pair = nn.Parameter(torch.randn(2, 400))
        self.single = nn.Parameter(torch.randn(1, 400))
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + self.back(torch.relu(self.wide(x))))
        image = torch.relu(self.convolution(x[..., :256].unflatten(-1, (16, 16)).unsqueeze(-1).expand(-1, -1, -1, 9)))
        extra = self.small(image.flatten(1)[:, :77]).sum() + (self.pair.sum() + self.single.sum()) * 1e-3
        return self.head(x) + extra


OPTIONS = {"lr": 1e-2, "min_size": 310}  # 310: `small` is in 8 bits, norms and biases aren't


def mesh() -> DeviceMesh:
    """Of all ranks."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """The same model in every world; sharded in all but the single process."""
    torch.manual_seed(seed)
    model = Net(dtype)
    if dist.is_initialized():
        fully_shard(model, mesh=mesh())
    return model


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def placed_like(p: Tensor, whole: Tensor) -> Tensor:
    return distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """A step with whole gradients that depend on ``number`` alone."""
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        whole = torch.randn(p.shape, generator=generator) * torch.exp(torch.randn(p.shape, generator=generator))
        p.grad = placed_like(p, whole.to(p.dtype))
    optimizer.step()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Whole parameters and states by the parameter's name; a collective."""
    return {
        name: {"param": full(p), **{k: full(x) for k, x in optimizer.state[p].items()}}
        for name, p in model.named_parameters()
    }


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """``torch.distributed.checkpoint`` asks for the states of the new optimizer first."""
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
