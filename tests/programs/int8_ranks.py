"""Int8 layers on two gloo ranks: DDP, and FSDP2 with and without resharding after the forward, train the weights of
one process that splits its batches the same way. Exits with 0 where they are equal, and the products were in int8.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.ranks import fork, join
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lowbit_lightning import convert, kernels
from lowbit_lightning.strategies.blocks import average_gradients

RANKS, STEPS, MICRO_BATCHES, BLOCKS, WIDTH = 2, 3, 2, 2, 64
LINEARS = 4 * BLOCKS  # of a block two layers, and the two projections of its attention


class Block(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(WIDTH, 4)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        mixed = self.conv(self.up(x).unflatten(1, (16, -1))).flatten(1)
        return x + self.down(nn.functional.gelu(mixed))


def model(checkpointed: bool = False, **settings: Any) -> nn.Sequential:
    """Every int8 layer lies behind a norm, so that its input needs a gradient."""
    torch.manual_seed(0)
    built = nn.Sequential(*(Block(checkpointed) for _ in range(BLOCKS)), nn.Linear(WIDTH, 8))
    convert.swap_linears(built, **settings)
    return built


def batch(step: int, micro: int, rank: int) -> Tensor:
    return torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))


def loss(trained: nn.Module, x: Tensor) -> Tensor:
    return trained(x).square().mean()


def ranks(trained: Any, sync: Callable[[bool], Any]) -> dict[str, int]:
    """Train on this rank's micro-batches; gradients are averaged over the ranks after the last of a step."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    kernels.reset_calls()
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            sync(micro == MICRO_BATCHES - 1)
            loss(trained, batch(step, micro, dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {op: count for (op, _), count in kernels.calls().items()}


def alone(**settings: Any) -> nn.Module:
    """The same in one process: each rank's gradients are summed on their own, then averaged."""
    trained = model(**settings)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    for step in range(STEPS):
        sums = []
        for rank in range(RANKS):
            trained.zero_grad()
            for micro in range(MICRO_BATCHES):
                loss(trained, batch(step, micro, rank)).backward()
            sums.append([p.grad for p in trained.parameters()])
        for p, *gradients in zip(trained.parameters(), *sums, strict=True):
            p.grad = sum(g / RANKS for g in gradients)  # type: ignore[assignment, misc]
        optimizer.step()
    return trained


def replicated(**settings: Any) -> tuple[nn.Module, dict[str, int]]:
    trained = model(**settings)
    wrapped = DistributedDataParallel(trained)
    return trained, ranks(wrapped, lambda last: setattr(wrapped, "require_backward_grad_sync", last))


def sharded(reshard: bool, checkpointed: bool = False, **settings: Any) -> tuple[nn.Module, dict[str, int]]:
    trained: Any = model(checkpointed, **settings)
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in (*trained, trained):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    average_gradients(trained, mesh)
    return trained, ranks(trained, trained.set_requires_gradient_sync)


def full(trained: nn.Module) -> Iterator[Tensor]:
    for p in trained.parameters():
        yield p.full_tensor() if hasattr(p, "full_tensor") else p


def check(name: str, result: tuple[nn.Module, dict[str, int]], expected: nn.Module, calls: dict[str, int]) -> None:
    trained, counted = result
    assert counted == calls, f"{name}: called {counted}, should call {calls}"
    for (parameter, a), b in zip(expected.named_parameters(), full(trained), strict=True):
        assert torch.equal(a, b), f"{name}: {parameter} differs by {(a - b).abs().max()}"


def rank(number: int, folder: Path) -> None:
    join(number, RANKS, folder / "store")
    expected = alone()
    linears, convs = STEPS * MICRO_BATCHES * LINEARS, STEPS * MICRO_BATCHES * BLOCKS
    each_time = {
        **{"int8_matmul": 3 * linears, "int8_conv": convs, "int8_conv_input": convs, "int8_conv_weight": convs},
        **{"quantize_both": 2 * linears + convs, "quantize_image": convs},  # x in the forward, dy in the backward
        **{"quantize_rowwise": linears + convs, "quantize_colwise": linears, "quantize_channels": convs},  # w
    }
    check("DDP", replicated(), expected, each_time)
    check("FSDP2", sharded(reshard=True), expected, each_time)
    check("FSDP2 without resharding", sharded(reshard=False), expected, each_time)
    again = {"int8_matmul": linears, "int8_conv": convs, "quantize_both": linears, "quantize_image": convs}
    again["quantize_rowwise"] = linears + convs
    twice = {op: count + again.get(op, 0) for op, count in each_time.items()}
    check("FSDP2, checkpointed", sharded(True, checkpointed=True), expected, twice)
    rotated = each_time | {"hadamard": 6 * linears, "quantize_both": convs}  # both forms of x, w and dy
    rotated |= {"quantize_rowwise": 3 * linears + convs, "quantize_colwise": 3 * linears}
    expected = alone(rotation="hadamard")
    check("DDP, rotated", replicated(rotation="hadamard"), expected, rotated)
    check("FSDP2, rotated", sharded(reshard=True, rotation="hadamard"), expected, rotated)
    dist.destroy_process_group()


if __name__ == "__main__":
    fork(rank, (Path(sys.argv[1]),), RANKS)
