"""Paged states of sharded parameters, on gloo ranks: ``paged_ranks.py FOLDER``.

Every rank runs all checks, each with paged states (under the engine that lies in wait) and without, and writes
``FOLDER/RANK.json``: for each check the first thing that is wrong, or null. ``tests/optim/test_paged_ranks.py`` reads
them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.paged_engine import lying_in_wait
from support.ranks import fork, join, write_outcomes
from support.sharded_state import build, load, placed_like, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowbit_lightning import optim
from lowbit_lightning.state import shards
from lowbit_lightning.state.pages import Entries

WORLD = 2
CHUNK = 40_000
OPTIONS: dict[str, Any] = {"lr": 1e-2, "min_size": 310}


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def step(model: nn.Module, optimizer: optim.LowBitOptimizer, number: int, clip: bool = False) -> None:
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = placed_like(p, torch.randn(p.shape, generator=generator).to(p.dtype))
    optimizer.clip_next_step(1.0 if clip else None)
    optimizer.step()


def found(model: nn.Module, optimizer: optim.LowBitOptimizer) -> dict[str, Tensor]:
    """This rank's parts of all parameters and states."""
    result = {f"{name}": local(p).detach().clone() for name, p in model.named_parameters()}
    for key, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            assert name == "step" or isinstance(value, DTensor), f"{key}.{name} is no DTensor"
            result[f"{key}.{name}"] = local(value).clone()
    return result


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> str | None:
    if a.keys() != b.keys():
        return f"other entries: {sorted(a.keys() ^ b.keys())}"
    return next((name for name in a if not torch.equal(a[name], b[name])), None)


def run(kind: str, dtype: torch.dtype, paged: bool, **options: Any) -> dict[str, Tensor]:
    model = build(dtype=dtype)
    optimizer = getattr(optim, kind)(model.parameters(), paged=paged, **{**OPTIONS, **options})
    for number in range(4):
        step(model, optimizer, number, clip=number % 2 == 1)
        if number == 1:  # in the middle, to other bits and back
            optimizer.param_groups[0]["bits"] = 40 - optimizer.param_groups[0]["bits"]
        if number == 2:
            optimizer.param_groups[0]["bits"] = 40 - optimizer.param_groups[0]["bits"]
    entries = [optimizer.state[p] for p in model.parameters() if local(p).numel()]
    assert all(isinstance(e, Entries) == paged for e in entries)
    return found(model, optimizer)


def steps_are_the_unpaged_ones(folder: Path) -> str | None:
    cases: list[tuple[str, torch.dtype, dict[str, Any]]] = [
        ("AdamW", torch.float32, {}),
        ("AdamW", torch.float32, {"bits": 32}),
        ("LAMB", torch.float32, {}),
        ("AdamW", torch.bfloat16, {"stochastic_rounding": True}),
        ("AdamW", torch.bfloat16, {"master": "bf16+8"}),
    ]
    for seed, (kind, dtype, options) in enumerate(cases):
        expected = run(kind, dtype, paged=False, **options)
        with lying_in_wait(seed, 0.1 * seed, CHUNK):
            got = run(kind, dtype, paged=True, resident=CHUNK, **options)
        problem = difference(got, expected)
        if problem:
            return f"{kind} {options}: {problem} differs"
    return None


def checkpoints_go_both_ways(folder: Path) -> str | None:
    """Through ``torch.distributed.checkpoint``, which asks for the states of a new optimizer first."""
    model = build()
    optimizer = optim.AdamW(model.parameters(), **OPTIONS)
    for number in range(6):
        step(model, optimizer, number)
    expected = found(model, optimizer)
    with lying_in_wait(7, 0.1, CHUNK):
        model = build()
        optimizer = optim.AdamW(model.parameters(), **OPTIONS, paged=True)
        for number in range(2):
            step(model, optimizer, number)
        for number, paged in ((2, False), (4, True)):
            save(model, optimizer, folder / f"at_{number}")
            model = build(seed=5)
            optimizer = optim.AdamW(model.parameters(), **OPTIONS, paged=paged)
            load(model, optimizer, folder / f"at_{number}")
            for later in range(number, number + 2):
                step(model, optimizer, later)
        return difference(found(model, optimizer), expected)


def gradients_are_released(folder: Path) -> str | None:
    """FSDP2's own backward, each parameter updated in it."""
    results = []
    tokens = torch.arange(7).repeat(4)
    for paged in (False, True):
        with lying_in_wait(3, 0.2, CHUNK):
            model = build()
            optimizer = optim.AdamW(model.parameters(), **OPTIONS, paged=paged)
            handle = optim.release_gradients(model, optimizer)
            for _ in range(4):
                nn.functional.cross_entropy(model(tokens), (tokens + 1) % 7).backward()
                optimizer.step()
                optimizer.zero_grad()
            handle.remove()
            results.append(found(model, optimizer))
    return difference(*results)


def parts_stay_where_they_lie(folder: Path) -> str | None:
    """A DTensor of this mesh from a part that is not on its device, as host memory is not on a GPU."""
    for p in build().parameters():
        part = torch.empty(local(p).shape, dtype=torch.uint8, device="meta")
        x = shards.leave(p, part, p.shape, stays=True)
        assert isinstance(p, DTensor)
        assert isinstance(x, DTensor)
        if (x.shape, x.placements, x.dtype, x.to_local().device) != (p.shape, p.placements, part.dtype, part.device):
            return f"{x.shape} {x.placements} {x.dtype} {x.to_local().device}"
    return None


CHECKS = (parts_stay_where_they_lie, steps_are_the_unpaged_ones, checkpoints_go_both_ways, gradients_are_released)


def rank_main(rank: int, folder: Path) -> None:
    join(rank, WORLD, folder / "store")
    write_outcomes(folder / f"{rank}.json", CHECKS, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    fork(rank_main, (Path(sys.argv[1]),), WORLD)
