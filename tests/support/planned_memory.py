"""What training really takes, for the tests of the planner: bytes of the tensors that a run leaves, and the peak of
torch's CPU allocator, as its profiler records every allocation. ``python planned_memory.py FOLDER`` does so for two
ranks.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit_lightning import optim, sharding
from lowbit_lightning.strategies import blocks, buffers
from lowbit_lightning.strategies.gather import gather_in_int8
from support.ranks import fork

VOCABULARY, WIDTH, LENGTH, BATCH = 301, 128, 64, 8
EXACT = ("parameters", "gradients", "states", "buffers")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """A small GPT whose forward returns the loss; frozen positions, a buffer, odd sizes."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.zeros(LENGTH, WIDTH), requires_grad=False)
        self.register_buffer("scale", torch.ones(77))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = nn.Linear(512, 301), nn.Linear(77, 5)
        self.convolution, self.few = nn.Conv2d(16, 30, 3), nn.Embedding(7, 700)
        self.tied = nn.Linear(700, 7, bias=False)
        self.tied.weight = self.few.weight
        self.frozen = nn.Linear(90, 90).requires_grad_(False)
        self.narrow, self.long = nn.Linear(63, 300), nn.Parameter(torch.zeros(5000))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def batch(size: int = BATCH) -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(0, VOCABULARY, (size, LENGTH)) for _ in range(2))  # type: ignore[return-value]


def own(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def states_of(optimizer: torch.optim.Optimizer) -> int:
    return sum(own(x).nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor))


def left_behind(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this rank's tensors."""
    params = list(model.parameters())
    return {
        "parameters": sum(own(p).nbytes for p in params),
        "gradients": sum(own(p.grad).nbytes for p in params if p.grad is not None),
        "states": states_of(optimizer),
        "buffers": sum(b.nbytes for b in model.buffers()),
    }


def peak_of(build: Callable[[], Callable[[], None]]) -> int:
    """The most bytes that torch's CPU allocator held in a second step, of all it allocated since before ``build``,
    which makes the run and returns its step. (The first makes states, and FSDP2's and DDP's plans.)"""
    gc.collect()  # what is freed while it records would count as less than nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step = build()
            step()
            with torch.profiler.record_function("measured from here"):
                pass
            step()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns())  # type: ignore[union-attr]
    held, peak, measured = 0, 0, False
    for event in events:
        measured |= event.name() == "measured from here"
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held) if measured else 0
    return peak


def train(model: nn.Module, make: Callable[[Any], torch.optim.Optimizer], data: Any, cast: bool = False) -> Any:
    """``(step, optimizer)`` of plain training."""
    optimizer = make(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = model(*data)
        loss.backward()
        optimizer.step()

    return step, optimizer


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    return optimizer


def within(planned: int, measured: int, tolerance: float) -> bool:
    return abs(planned - measured) <= tolerance * measured


class Travels(TorchDispatchMode):
    """Bytes by collective: of the whole tensor, which is the output of a gather and the input of a reduction."""

    OPS: ClassVar = {
        "_allgather_base_": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
        "allreduce_": "all_reduce",
        "broadcast_": "broadcast",
    }

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(self.OPS.values(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.bytes[self.OPS[func._schema.name.split("::")[1]]] += max(sizes)
        return func(*args, **(kwargs or {}))


def _measured(name: str, mesh: Any, data: Any) -> dict[str, int]:
    kept: list[Any] = []
    cast = "bf16" in name

    def build() -> Callable[[], None]:
        model: nn.Module = Model()
        if name == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            policy = MixedPrecisionPolicy(torch.bfloat16 if cast else None, torch.float32, cast_forward_inputs=False)
            blocks.shard(model, sharding.chosen_blocks(model, None), mesh, "zero3" in name, mp_policy=policy)
        if "int8" in name:
            gather_in_int8(model)
        step, optimizer = train(model, optim.AdamW, data, cast)
        if "released" in name:
            optim.release_gradients(model, optimizer)

        def as_the_strategy() -> None:
            if name != "ddp":
                buffers.share(model)
            step()

        kept.extend([model, optimizer, as_the_strategy])
        return as_the_strategy

    found = {"peak": peak_of(build), **left_behind(*kept[:2])}
    with Travels() as travels:
        kept[2]()
    return {**found, **travels.bytes}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mesh, data, found = init_device_mesh("cpu", (2,)), batch(), {}
    in_int8 = ("zero3 in int8", "zero2 in int8") if torch.__version__ >= "2.8" else ()
    for name in ("ddp", "zero3", "zero2", "zero3 in bf16", "zero3 released", *in_int8):
        found[name] = _measured(name, mesh, data)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    fork(_rank, (sys.argv[1],), 2)
