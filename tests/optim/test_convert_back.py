"""Back to torch.optim: ``state_dict(bits=32)`` is what torch's optimizers load, and they go on from it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.optimizers import parameters, step, twins
from support.torch_runs import KINDS, SHAPES, Run, name
from torch import Tensor

from lowbit_lightning import optim


def states(optimizer: Any, params: list[Any]) -> list[dict[str, Tensor]]:
    kept = [optimizer.state.get(p, {}) for p in params]
    return [{k: v.clone() for k, v in s.items() if isinstance(v, Tensor)} for s in kept]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=name)
def test_to_torch_and_back_is_exact_in_32_bits(kind: str, options: dict[str, Any]) -> None:
    """torch -> ours -> torch: the same states, and the same steps from there on; one parameter has no gradient yet."""
    params = parameters(*SHAPES, (40,))
    first = getattr(torch.optim, kind)(params, **options)
    for i in range(3):
        step(first, params[:3], i)
    others = twins(params)
    ours = getattr(optim, kind)(others, bits=32)
    ours.load_state_dict(copy.deepcopy(first.state_dict()))
    back = twins(params)
    second = getattr(torch.optim, kind)(back)
    second.load_state_dict(copy.deepcopy(ours.state_dict(bits=32)))
    for old, new in zip(states(first, params), states(second, back), strict=True):
        assert {k: v for k, v in old.items() if k != "step"}.keys() == {k for k in new if k != "step"}
        assert all(torch.equal(old[k], new[k]) for k in old)
    for key, value in first.param_groups[0].items():
        assert key == "params" or second.param_groups[0][key] == value
    for i in range(3, 6):
        step(first, params, i)
        step(second, back, i)
    assert all(torch.equal(p, q) for p, q in zip(params, back, strict=True))


@pytest.mark.parametrize("bits", [8, 32])
def test_torchs_adagrad_finds_the_sums_that_ours_has_not_made_yet(bits: int) -> None:
    params = parameters((16, 512), (300,), (40,))
    ours = optim.Adagrad([{"params": params[:2]}, {"params": params[2:]}], initial_accumulator_value=0.5, bits=bits)
    step(ours, params[:1])
    others = twins(params)
    theirs = torch.optim.Adagrad([{"params": others[:2]}, {"params": others[2:]}])
    theirs.load_state_dict(copy.deepcopy(ours.state_dict(bits=32)))
    assert all((theirs.state[p]["sum"] == 0.5).all() for p in others[1:])
    for i in range(3):
        step(ours, params, i)
        step(theirs, others, i)
    for p, q in zip(params[1:], others[1:], strict=True):  # too small for 8 bits
        assert (p - q).norm() <= 1e-6 * q.norm()


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=name)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("before", [0, 3])
def test_torch_goes_on_from_our_state(kind: str, options: dict[str, Any], bits: int, before: int) -> None:
    run = Run(kind, **options)
    optim.convert_(run.optimizer, bits)
    if before:
        run.steps(before)
    saved = copy.deepcopy(run.optimizer.state_dict(bits=32))
    torchs = Run(kind)
    torchs.optimizer.load_state_dict(saved)
    torchs.model.load_state_dict(run.model.state_dict())
    torchs.data.set_state(run.data.get_state())
    assert {type(v) for s in torchs.optimizer.state.values() for v in s.values()} <= {Tensor}
    ours, theirs = run.steps(20), torchs.steps(20)
    assert (ours - theirs).norm() <= (1e-6 if bits == 32 else 0.01) * theirs.norm()
