"""A second moment that overflowed in 32 bits, and what its element is worth in 8: nothing, as after such a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from lowbit_lightning import optim

Change = Callable[[list[Parameter], torch.optim.Optimizer], torch.optim.Optimizer]
SHAPE = (16, 512)
HUGE = 1e25
"""A finite gradient whose square is none in float32."""


def converted(params: list[Parameter], optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optim.convert_(optimizer)


def loaded(params: list[Parameter], optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    ours = optim.AdamW(params)
    ours.load_state_dict(optimizer.state_dict())
    return ours


def loaded_in_32_bits(params: list[Parameter], optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """And turned to 8 for the next step."""
    ours = optim.AdamW(params, bits=32)
    ours.load_state_dict(optimizer.state_dict())
    ours.param_groups[0]["bits"] = 8
    return ours


def loaded_from_bitsandbytes(params: list[Parameter], optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    saved = optimizer.state_dict()
    names = {"exp_avg": "state1", "exp_avg_sq": "state2", "step": "step"}
    saved["state"] = {k: {names[n]: x for n, x in entries.items()} for k, entries in saved["state"].items()}
    ours = optim.AdamW(params)
    ours.load_state_dict(saved)
    return ours


@pytest.mark.parametrize("change", [converted, loaded, loaded_in_32_bits, loaded_from_bitsandbytes])
def test_an_overflowed_second_moment_takes_its_momentum_along(change: Change) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(SHAPE, generator=generator))]
    theirs = [Parameter(p.detach().clone()) for p in params]
    plain = torch.optim.AdamW(theirs, lr=1e-3)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(params, lr=1e-3)
    for number in range(8):
        gradient = torch.randn(SHAPE, generator=generator)
        if number == 2:
            gradient[3, 5] = HUGE
        if number == 4:
            assert optimizer.state[params[0]]["exp_avg_sq"][3, 5].isinf()
            assert optimizer.state[params[0]]["exp_avg"][3, 5].isfinite()
            optimizer = change(params, optimizer)
        for each, one in ((params, optimizer), (theirs, plain)):
            each[0].grad = gradient.clone()
            one.step()
        assert (params[0] - theirs[0]).abs().max() < 2e-3 * (number + 1)
    entries = optimizer.state[params[0]]
    assert entries["exp_avg_codes"].dtype == torch.uint8
    assert (params[0] - theirs[0]).abs().median() < 1e-4
