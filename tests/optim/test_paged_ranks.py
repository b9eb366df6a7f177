"""Paged states of sharded parameters, on two ranks: under the engine that lies in wait, and unpaged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.on_ranks import on_ranks
from support.paged_engine import lying_in_wait
from support.ranks import equal
from support.sharded_state import build, load, placed_like, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowbit_lightning import optim
from lowbit_lightning.state import shards
from lowbit_lightning.state.pages import Entries

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")

CHUNK = 40_000
OPTIONS: dict[str, Any] = {"lr": 1e-2, "min_size": 310}


def step(model: nn.Module, optimizer: optim.LowBitOptimizer, number: int, clip: bool = False) -> None:
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = placed_like(p, torch.randn(p.shape, generator=generator).to(p.dtype))
    optimizer.clip_next_step(1.0 if clip else None)
    optimizer.step()


Found = dict[str, dict[str, Tensor]]


def found(model: nn.Module, optimizer: optim.LowBitOptimizer) -> Found:
    """This rank's parts of all parameters and states."""
    result: Found = {"parameters": {name: shards.local(p).detach().clone() for name, p in model.named_parameters()}}
    for key, entries in optimizer.state_dict()["state"].items():
        assert all(name == "step" or isinstance(value, DTensor) for name, value in entries.items())
        result[str(key)] = {name: shards.local(value).clone() for name, value in entries.items()}
    return result


def run(kind: str, dtype: torch.dtype, paged: bool, **options: Any) -> Found:
    model = build(dtype=dtype)
    optimizer = getattr(optim, kind)(model.parameters(), paged=paged, **{**OPTIONS, **options})
    for number in range(4):
        step(model, optimizer, number, clip=number % 2 == 1)
        if number in (1, 2):  # in the middle, to other bits and back
            optimizer.param_groups[0]["bits"] = 40 - optimizer.param_groups[0]["bits"]
    entries = [optimizer.state[p] for p in model.parameters() if shards.local(p).numel()]
    assert all(isinstance(e, Entries) == paged for e in entries)
    return found(model, optimizer)


@on_ranks(2)
def test_steps_are_the_unpaged_ones(folder: Path) -> str | None:
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
        problem = equal(got, expected)
        if problem:
            return f"{kind} {options}: {problem}"
    return None


@on_ranks(2)
def test_checkpoints_go_both_ways(folder: Path) -> str | None:
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
        return equal(found(model, optimizer), expected)


@on_ranks(2)
def test_gradients_are_released(folder: Path) -> str | None:
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
    return equal(*results)


@on_ranks(2)
def test_parts_stay_where_they_lie(folder: Path) -> str | None:
    """A DTensor of this mesh from a part that is not on its device, as host memory is not on a GPU."""
    for p in build().parameters():
        part = torch.empty(shards.local(p).shape, dtype=torch.uint8, device="meta")
        x = shards.leave(p, part, p.shape, stays=True)
        assert isinstance(p, DTensor)
        assert isinstance(x, DTensor)
        if (x.shape, x.placements, x.dtype, x.to_local().device) != (p.shape, p.placements, part.dtype, part.device):
            return f"{x.shape} {x.placements} {x.dtype} {x.to_local().device}"
    return None
