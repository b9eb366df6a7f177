"""Unscaling, clipping and skipping inside the step, in plain training loops: against float64 and torch's passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.host_reads import reads
from support.optimizers import FAMILY, close, parameters, spread, step, twins, values
from torch import Tensor, nn
from torch.nn import Parameter

from lowbit_lightning import optim

SHAPES = ((32, 512), (5, 77), (300,), (0,))
SCALE = 1024.0


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": SCALE, "growth_interval": 1000, **options})


def gradients(params: list[Parameter], size: float = 1.0, scale: float = 1.0) -> list[Tensor]:
    """Set gradients; returns the unscaled ones in float64."""
    exact = []
    for p in params:
        unscaled = spread(p) * size
        p.grad = unscaled * scale
        exact.append(unscaled.double())
    return exact


def clipped(exact: list[Tensor], max_norm: float) -> list[Tensor]:
    norm = torch.stack([g.square().sum() for g in exact]).sum().sqrt()
    return [g * (max_norm / (norm + 1e-6)).clamp(max=1.0) for g in exact]


def check_subtracted(params: list[Parameter], before: list[Tensor], exact: list[Tensor]) -> None:
    """Plain SGD at a rate of 1 subtracts the gradient itself."""
    for p, old, g in zip(params, before, exact, strict=True):
        rounding = 1e-6 if p.dtype == torch.float32 else 1e-2
        off = (p.detach().double() - (old.double() - g)).abs()
        assert (off <= rounding * (old.abs() + g.abs())).all(), f"off by {off.max():.1e}"


def scaled_step(scaler: torch.amp.GradScaler, optimizer: Any) -> None:
    """``scaler.step`` where gradients came by no loss: ``scale`` makes the scale's tensor."""
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()


# -- a GradScaler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
def test_unscaled_and_clipped_in_the_step(max_norm: float | None) -> None:
    params = parameters(*SHAPES)
    before = values(params)
    optimizer = optim.SGD(params, lr=1.0)
    exact = gradients(params, scale=SCALE)
    held = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.clip_next_step(max_norm)
    scaled_step(scaler(), optimizer)
    wanted = exact if max_norm is None else clipped(exact, max_norm)
    check_subtracted(params, before, wanted)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, held, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("bits", [8, 32])
def test_equal_to_unscaling_and_clipping_by_hand(kind: str, bits: int) -> None:
    """Norm phases see the unscaled, clipped gradient too. A step that overflows counts nowhere."""
    ours = parameters(*SHAPES)
    theirs = twins(ours)
    a, b = (getattr(optim, kind)(params, lr=1e-2, bits=bits) for params in (ours, theirs))
    one, other = scaler(), scaler()
    for i in range(4):
        gradients(ours, scale=SCALE if i < 3 else SCALE / 2)
        if i == 2:
            ours[1].grad[2, 3] = math.inf  # type: ignore[index]
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()  # type: ignore[union-attr]
        a.clip_next_step(1.0)
        scaled_step(one, a)
        other.scale(torch.zeros(()))
        other.unscale_(b)
        nn.utils.clip_grad_norm_(theirs, 1.0)
        scaled_step(other, b)
        assert one.get_scale() == other.get_scale()
    close(ours, theirs, 1e-6 if bits == 32 and kind != "Lion" else 1e-3)  # a code, or a sign near zero, may differ
    assert one.get_scale() == SCALE / 2
    assert {float(a.state[p]["step"]) for p in ours} == {3.0}


@pytest.mark.parametrize("bits", [8, 32])
def test_an_overflow_changes_nothing(bits: int) -> None:
    params = parameters(*SHAPES)
    optimizer = optim.AdamW(params, bits=bits)
    step(optimizer, params)
    before = values(params) + [x.clone() for p in params for x in optimizer.state[p].values()]
    gradients(params, scale=SCALE)
    params[2].grad[7] = math.nan  # type: ignore[index]
    one = scaler()
    scaled_step(one, optimizer)
    after = values(params) + [x for p in params for x in optimizer.state[p].values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert one.get_scale() == SCALE / 2


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_the_host_reads_nothing(skip_nonfinite: bool) -> None:
    def run(optimizer: Any, params: list[Parameter]) -> int:
        one = scaler()
        one.scale(torch.zeros(()))
        step(optimizer, params)
        if isinstance(optimizer, optim.LowBitOptimizer):
            optimizer.clip_next_step(1.0)
        with reads() as found:
            one.step(optimizer)
        return found.count

    params = parameters(*SHAPES)
    assert run(optim.AdamW(params, skip_nonfinite=skip_nonfinite), params) == 0
    assert run(torch.optim.AdamW(params), params) > 0, "what is counted here, torch's own loop has"


def test_torchs_recipe_for_clipping() -> None:
    """scaler.unscale_, clip_grad_norm_, scaler.step: the gradients are neither unscaled nor clipped a second time."""
    params = parameters(*SHAPES)
    before = values(params)
    optimizer, one = optim.SGD(params, lr=1.0), scaler()
    exact = gradients(params, scale=SCALE)
    one.scale(torch.zeros(()))
    one.unscale_(optimizer)
    nn.utils.clip_grad_norm_(params, 0.5)
    scaled_step(one, optimizer)
    check_subtracted(params, before, clipped(exact, 0.5))
    assert not hasattr(optimizer, "grad_scale")


def test_float16_parameters() -> None:
    """GradScaler.unscale_ refuses them; a step that unscales need not."""
    params = parameters((16, 512), dtype=torch.float16)
    before = values(params)
    optimizer = optim.SGD(params, lr=1.0)
    exact = gradients(params, 1e-3, scale=SCALE)
    scaled_step(scaler(), optimizer)
    check_subtracted(params, before, exact)


def test_a_scale_that_is_no_power_of_two_and_a_scaler_that_is_off() -> None:
    params = parameters((16, 512))
    before = values(params)
    optimizer = optim.SGD(params, lr=1.0)
    exact = gradients(params, scale=1000.0)
    scaled_step(scaler(init_scale=1000.0), optimizer)
    check_subtracted(params, before, exact)
    before, exact = values(params), gradients(params)
    scaled_step(torch.amp.GradScaler("cpu", enabled=False), optimizer)
    check_subtracted(params, before, exact)


def test_no_gradients_at_all() -> None:
    params = parameters((16, 512))
    optimizer, one = optim.AdamW(params), scaler()
    one.scale(torch.zeros(()))
    optimizer.clip_next_step(1.0)
    one.step(optimizer)
    assert not optimizer.state
    with pytest.raises(AssertionError, match="No inf checks were recorded"):  # torch's own answer
        one.update()


def test_a_scaler_and_skip_nonfinite_are_both_heard() -> None:
    params = parameters((16, 512), (300,))
    optimizer = optim.AdamW(params, skip_nonfinite=True)
    for bad in (True, False):
        gradients(params, scale=SCALE)
        if bad:
            params[0].grad[0, 0] = math.inf  # type: ignore[index]
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), torch.zeros(1)  # type: ignore[attr-defined]
        optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1
    optimizer.found_inf = torch.ones(1)  # type: ignore[attr-defined]
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [None, math.inf, math.nan, 0.0, 1e-30, 1e25])
def test_clipping_alone_is_torchs(grad: float | None) -> None:
    """With gradients that are not finite, nothing, or so small or large that their squares are: as torch does."""
    ours = parameters(*SHAPES)
    theirs = twins(ours)
    a, b = optim.AdamW(ours, bits=32), torch.optim.AdamW(theirs)
    for _ in range(3):
        gradients(ours)
        if grad is not None and not math.isfinite(grad):
            ours[0].grad[3, 4] = grad  # type: ignore[index]
        elif grad is not None:
            for p in ours:
                p.grad.fill_(grad)  # type: ignore[union-attr]
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()  # type: ignore[union-attr]
        a.clip_next_step(0.1)
        a.step()
        nn.utils.clip_grad_norm_(theirs, 0.1)
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_one_norm_over_groups_dtypes_and_states() -> None:
    params = [*parameters((16, 512), (40,)), *parameters((16, 512), dtype=torch.bfloat16)]
    before = values(params)
    optimizer = optim.SGD([{"params": params[:1]}, {"params": params[1:], "bits": 32}], lr=1.0)
    exact = gradients(params)
    optimizer.clip_next_step(1.0)
    optimizer.step()
    check_subtracted(params, before, clipped(exact, 1.0))


def test_below_the_norm_nothing_changes_to_the_bit() -> None:
    ours = parameters((16, 512), (300,))
    theirs = twins(ours)
    a, b = optim.AdamW(ours), optim.AdamW(theirs)
    for i in range(3):
        a.clip_next_step(1e9)
        step(a, ours, i)
        step(b, theirs, i)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_it_is_the_next_step_alone_that_is_clipped() -> None:
    ours = parameters((16, 512))
    theirs = twins(ours)
    a, b, old = optim.SGD(ours, lr=1.0), optim.SGD(theirs, lr=1.0), ours[0].detach().clone()
    a.clip_next_step(1e-3)
    step(a, ours, 0)
    assert float((ours[0] - old).detach().norm()) == pytest.approx(1e-3, rel=1e-3)
    with torch.no_grad():
        theirs[0].copy_(ours[0])
    a.clip_next_step(1e-3)
    a.clip_next_step(None)
    for i in (1, 2):
        step(a, ours, i)
        step(b, theirs, i)
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_norm_that_is_none(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be positive, or None for no clipping, got"):
        optim.SGD(parameters((3,))).clip_next_step(max_norm)


def test_released_gradients_can_be_neither_unscaled_nor_clipped() -> None:
    model = nn.Linear(64, 64)
    optimizer = optim.AdamW(model.parameters())
    optim.release_gradients(model, optimizer)
    one = scaler()
    one.scale(model(torch.randn(4, 64)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"gradients were released .* a GradScaler"):
        one.step(optimizer)
    model(torch.randn(4, 64)).sum().backward()
    optimizer.clip_next_step(1.0)
    with pytest.raises(RuntimeError, match=r"gradients were released .* clip"):
        optimizer.step()
