"""``parameter.state_bits``: a parameter decides how its states are kept, and embeddings decide for their tables."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fake_ranks import being_rank
from torch import nn
from torch.distributed.fsdp import fully_shard

from lowbit_lightning import layers, memory, optim


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()


def bits(entries: dict[str, Any]) -> int:
    return 8 if any(name.endswith("_codes") for name in entries) else 32


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Lion, optim.LAMB, optim.RMSprop, optim.Adagrad])
def test_a_parameter_overrules_its_group(kind: Callable[..., Any]) -> None:
    ps = [nn.Parameter(torch.randn(64, 128)) for _ in range(3)]
    ps[1].state_bits = 32  # type: ignore[attr-defined]
    low = kind(ps, lr=1e-3)
    step(low)
    assert [bits(low.state[p]) for p in ps] == [8, 32, 8]
    assert [bits(entries) for entries in low.state_dict()["state"].values()] == [8, 32, 8]

    ps[2].state_bits = 8  # type: ignore[attr-defined]
    high = kind(ps, lr=1e-3, bits=32)
    high.load_state_dict(low.state_dict())  # what has the wanted form is kept, the rest is converted
    assert [bits(high.state[p]) for p in ps] == [32, 32, 8]


def test_a_later_change_converts_the_states() -> None:
    p = nn.Parameter(torch.randn(64, 128))
    optimizer = optim.AdamW([p], lr=1e-3)
    step(optimizer)
    before = optimizer.state_dict(bits=32)["state"][0]["exp_avg"]
    p.state_bits = 32  # type: ignore[attr-defined]
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(optimizer.state[p]["exp_avg"], 0.9 * before)
    p.state_bits = None  # type: ignore[attr-defined]
    step(optimizer)
    assert bits(optimizer.state[p]) == 8


def test_other_values_are_refused() -> None:
    p = nn.Parameter(torch.randn(64, 128))
    p.state_bits = 16  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"state_bits of a parameter of shape \(64, 128\) must be 8, 32 .* got 16"):
        optim.AdamW([p])


def materialised(kind: type[nn.Embedding]) -> nn.Embedding:
    return kind(100, 64, device="meta").to_empty(device="cpu")


def assigned(kind: type[nn.Embedding]) -> nn.Embedding:
    table = kind(100, 64)
    table.load_state_dict(kind(100, 64).state_dict(), assign=True)
    return table


WAYS: dict[str, Callable[[type[nn.Embedding]], nn.Embedding]] = {
    "as it was built": lambda kind: kind(100, 64),
    "copied": lambda kind: copy.deepcopy(kind(100, 64)),
    "pickled": lambda kind: pickle.loads(pickle.dumps(kind(100, 64))),
    "cast": lambda kind: kind(100, 64).bfloat16(),
    "materialised": materialised,
    "assigned": assigned,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [layers.StableEmbedding, layers.Embedding32bit])
def test_tables_keep_their_states_in_32_bits(kind: type[nn.Embedding], way: str) -> None:
    table, linear = WAYS[way](kind), nn.Linear(64, 100)
    optimizer = optim.AdamW([*table.parameters(), *linear.parameters()], lr=1e-3)
    step(optimizer)
    assert bits(optimizer.state[table.weight]) == 32
    assert bits(optimizer.state[linear.weight]) == 8


def test_a_sharded_table_too() -> None:
    model = nn.Sequential(layers.StableEmbedding(100, 64), nn.Linear(64, 100))
    with being_rank(0, (2,)) as mesh:
        fully_shard(model, mesh=mesh)
        optimizer = optim.AdamW(model.parameters(), lr=1e-3)
        optimizer.form_states()
        found = [bits(optimizer.state[model.get_parameter(name)]) for name in ("0.weight", "1.weight")]
    assert found == [32, 8]


def test_the_planner_counts_them() -> None:
    model = nn.Sequential(layers.StableEmbedding(100, 64), nn.Linear(64, 100))
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    step(optimizer)
    taken = sum(value.nbytes for entries in optimizer.state.values() for value in entries.values())
    assert memory.plan(model, optimizer="AdamW").states == taken
