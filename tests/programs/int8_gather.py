"""Two gloo ranks train a model under FSDP2 with gathers in float32 and in int8: ``int8_gather.py FOLDER``.

Rank 0 writes ``FOLDER/result.json``: losses and gathered bytes of both, and the largest error of a gathered weight in
units of what quantisation by rows allows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.ranks import fork, join
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_lightning import optim
from lowbit_lightning.strategies.gather import gather_in_int8

RANKS, STEPS = 2, 40


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(65, 256)  # 65 rows on two ranks: 33 and 32
        self.up, self.down = nn.Linear(256, 513), nn.Linear(513, 256, bias=False)
        self.norm, self.single = nn.LayerNorm(256), nn.Parameter(torch.ones(1, 256))  # one rank holds none of single

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + self.down(torch.relu(self.up(x)))) * self.single
        return x @ self.embedding.weight.T


class Gathered(TorchDispatchMode):
    """The largest result of a gather among ranks, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in func.name():
            self.largest = max(self.largest, args[0].numel() * args[0].element_size())
        return func(*args, **(kwargs or {}))


def train(gather: str) -> tuple[list[float], int, float]:
    torch.manual_seed(0)
    model, moved = Net(), []
    nn.init.normal_(model.embedding.weight, std=0.05)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), reshard_after_forward=True)
    if gather == "int8":
        gather_in_int8(model)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)

    def watch(module: nn.Linear, _: Any) -> None:  # forward hooks see what was gathered
        moved.append(module.weight.detach().clone())

    model.up.register_forward_pre_hook(watch)
    generator = torch.Generator().manual_seed(1)
    losses, worst, gathered = [], 0.0, Gathered()
    for _ in range(STEPS):
        whole = model.up.weight.full_tensor()  # type: ignore[attr-defined]
        tokens = torch.randint(0, 65, (RANKS, 8, 17), generator=generator).cumsum(-1) % 65
        mine = tokens[dist.get_rank()]
        with gathered:
            loss = nn.functional.cross_entropy(model(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten())
            loss.backward()
        allowed = whole.abs().amax(1, keepdim=True) / 254
        worst = max(worst, float(((moved[-1] - whole).abs() / allowed).max()))
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        losses.append(float(loss.detach()) / RANKS)
    return losses, gathered.largest, worst


def run(rank: int, folder: Path) -> None:
    join(rank, RANKS, folder / "store")
    result = {gather: train(gather) for gather in ("high", "int8")}
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    fork(run, (Path(sys.argv[1]),), RANKS)
