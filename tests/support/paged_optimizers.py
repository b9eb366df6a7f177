"""Optimizers with paged and with unpaged states, for the tests of paging: the same parameters, the same steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lowbit_lightning import optim
from lowbit_lightning.state.pages import Entries
from support.optimizers import step
from support.paged_engine import lying_in_wait

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "lr": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),
    ("Lion", {}),
    ("LAMB", {}),
    ("LARS", {"lr": 0.1}),
    ("AdEMAMix", {"t_alpha": 3, "t_beta3": 3}),
]
SHAPES = [(96, 300), (70, 256), (5000,), (33,), (600, 512), (3, 100, 64), (0, 64), (150_001,)]
CHUNK = 150_000  # bytes: some parameters are cut, some share a chunk


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def build(kind: str, params: list[Parameter], **options: Any) -> optim.LowBitOptimizer:
    groups = [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.1}]
    return getattr(optim, kind)(groups, **options)


def states(optimizer: optim.LowBitOptimizer) -> dict[Any, dict[str, Tensor]]:
    return {key: dict(entries) for key, entries in optimizer.state_dict()["state"].items()}


def assert_same(ours: Any, theirs: Any) -> None:
    """Parameters and states of (params, optimizer), to the bit."""
    for i, (p, q) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert torch.equal(p, q), f"parameter {i}: {(p - q).abs().max()}"
    left, right = states(ours[1]), states(theirs[1])
    assert left.keys() == right.keys()
    for key, entries in left.items():
        assert entries.keys() == right[key].keys()
        for name, value in entries.items():
            assert torch.equal(value, right[key][name]), (key, name)


def both(
    act: Callable[[list[Parameter], optim.LowBitOptimizer], Any],
    kind: str = "AdamW",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    haste: float = 0.0,
    resident: int = 0,
    **options: Any,
) -> None:
    """``act`` on a paged and an unpaged optimizer; what comes out has to be the same."""
    unpaged = parameters(dtype)
    plain = build(kind, unpaged, **options)
    plain = act(unpaged, plain) or plain
    with lying_in_wait(seed, haste, CHUNK):
        params = parameters(dtype)
        paged = build(kind, params, paged=True, resident=resident, **options)
        paged = act(params, paged) or paged
        assert_same((params, paged), (unpaged, plain))
        assert any(isinstance(entries, Entries) for entries in paged.state.values())


def steps(params: list[Parameter], optimizer: torch.optim.Optimizer, numbers: range = range(3)) -> None:
    for number in numbers:
        step(optimizer, params, number)
