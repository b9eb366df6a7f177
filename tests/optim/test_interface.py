"""The optimizers as torch's machinery sees them: groups, schedulers, scalers, hooks, copies, autograd."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.optimizers import COPIES, close, copied, parameters, step, twins
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler, swa_utils

from lowbit_lightning import kernels, optim

# -- groups and learning rates -----------------------------------------------------------------------------------------


def test_groups_have_their_own_options() -> None:
    ours = parameters((16, 512), (16, 512), (300,))
    theirs = twins(ours)
    groups: list[dict[str, Any]] = [
        {"lr": 1e-2, "weight_decay": 0.3, "bits": 32},
        {"betas": (0.5, 0.9), "eps": 1e-4, "maximize": True, "bits": 32},
        {"amsgrad": True},
    ]
    a = optim.AdamW([{"params": [p], **g} for p, g in zip(ours, groups, strict=True)])
    plain = [{k: v for k, v in g.items() if k != "bits"} for g in groups]
    b = torch.optim.AdamW([{"params": [p], **g} for p, g in zip(theirs, plain, strict=True)])
    for i in range(10):
        step(a, ours, i)
        step(b, theirs, i)
    close(ours, theirs)
    assert "max_exp_avg_sq" in a.state[ours[2]]


def test_add_param_group_and_gradients_that_come_later() -> None:
    ours = parameters((16, 512), (300,), (40,))
    theirs = twins(ours)
    ours[2].requires_grad_(False)
    theirs[2].requires_grad_(False)
    frozen = ours[2].detach().clone()
    a, b = optim.AdamW([ours[0], ours[2]], bits=32), torch.optim.AdamW([theirs[0], theirs[2]])
    for i in range(3):
        step(a, ours[:1], i)
        step(b, theirs[:1], i)
    a.add_param_group({"params": [ours[1]], "lr": 1e-2})
    b.add_param_group({"params": [theirs[1]], "lr": 1e-2})
    for i in range(3):  # the new one has no gradient yet
        step(a, ours[:1], i)
        step(b, theirs[:1], i)
    assert ours[1] not in a.state
    for i in range(3):
        step(a, ours[:2], i)
        step(b, theirs[:2], i)
    close(ours[:2], theirs[:2])
    assert [float(a.state[p]["step"]) for p in ours[:2]] == [9, 3]
    assert torch.equal(ours[2], frozen)
    assert ours[2] not in a.state


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=12),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=12),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_schedulers(name: str, kind: str) -> None:
    """OneCycleLR cycles betas and momentum too."""
    options = {"momentum": 0.9} if kind == "SGD" else {}
    ours = parameters((300,))
    theirs = twins(ours)
    a, b = getattr(optim, kind)(ours, lr=1e-3, **options), getattr(torch.optim, kind)(theirs, lr=1e-3, **options)
    schedulers = SCHEDULERS[name](a), SCHEDULERS[name](b)
    for i in range(12):
        step(a, ours, i)
        step(b, theirs, i)
        for scheduler in schedulers:
            scheduler.step(1.0) if name == "plateau" else scheduler.step()
        assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"]
    close(ours, theirs)


def test_averaged_models() -> None:
    """torch's own average of the weights, and its schedule, beside either optimizer."""
    averages = []
    for library, options in ((optim, {"bits": 32}), (torch.optim, {})):
        torch.manual_seed(0)
        model = nn.Linear(64, 128)
        optimizer = library.AdamW(model.parameters(), lr=1e-2, **options)
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        schedule = swa_utils.SWALR(optimizer, swa_lr=1e-3, anneal_epochs=4)
        for i in range(8):
            step(optimizer, list(model.parameters()), i)
            average.update_parameters(model)
            schedule.step()
        assert any((p - q).abs().max() > 1e-4 for p, q in zip(model.parameters(), average.parameters(), strict=True))
        averages.append(list(average.parameters()))
    close(averages[0], averages[1])


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_as_a_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Read on the device at every step; schedulers change it in place."""
    ours = parameters((300,))
    theirs = twins(ours)
    lr = torch.full(shape, 1e-2, dtype=dtype)
    a, b = optim.AdamW(ours, lr=lr), torch.optim.AdamW(theirs, lr=1e-2)
    for i in range(4):
        step(a, ours, i)
        step(b, theirs, i)
        lr.mul_(0.5)
        b.param_groups[0]["lr"] *= 0.5
    assert a.param_groups[0]["lr"] is lr
    close(ours, theirs)


def test_schedulers_fill_a_tensor_in_place() -> None:
    (p,) = parameters((300,))
    lr = torch.tensor(1e-2)
    optimizer = optim.AdamW([p], lr=lr)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(optimizer, [p])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(5e-3)


def test_closure_and_hooks() -> None:
    (p,) = parameters((16, 512))
    optimizer = optim.AdamW([p])
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        seen.append("closure")
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = float(p.detach().square().sum())
    loss = optimizer.step(closure)
    assert float(loss.detach()) == pytest.approx(before)
    assert float(p.detach().square().sum()) < before
    assert seen == ["before", "closure", "after"]


def test_grad_scaler_unscales_and_skips() -> None:
    ours = parameters((16, 512))
    theirs = twins(ours)
    a, b = optim.AdamW(ours, bits=32), torch.optim.AdamW(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i in range(4):
        for p, optimizer in ((ours[0], a), (theirs[0], b)):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(i)
            loss = (p * torch.randn(p.shape, generator=generator)).sum() * (math.inf if i == 2 else 1.0)
            if p is ours[0]:
                scaler.scale(loss).backward()
                scaler.unscale_(a)
                nn.utils.clip_grad_norm_([p], 1.0)
                scaler.step(a)
                scaler.update()
            elif i != 2:
                loss.backward()
                nn.utils.clip_grad_norm_([p], 1.0)
                b.step()
    assert float(a.state[ours[0]]["step"]) == 3
    assert scaler.get_scale() == 512
    close(ours, theirs)


# -- copies, autograd, memory, defaults --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
def test_copies_go_on_alike(how: str) -> None:
    params = parameters((16, 512), (300,))
    optimizer = optim.AdamW(params)
    step(optimizer, params)
    twin = copied(optimizer, how)
    copies = [p for group in twin.param_groups for p in group["params"]]
    assert all(p is not q for p, q in zip(params, copies, strict=True))
    for i in range(3):
        step(optimizer, params, i)
        step(twin, copies, i)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_autograd_sees_that_a_step_overwrites() -> None:
    (p,) = parameters((16, 512))
    optimizer = optim.AdamW([p])
    step(optimizer, [p])
    states = {name: x._version for name, x in optimizer.state[p].items()}
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert all(x._version > states[name] for name, x in optimizer.state[p].items())


@pytest.mark.filterwarnings("ignore:some parameters of an optimizer are not contiguous")
def test_a_step_keeps_no_gradient_alive() -> None:
    """What is kept for the next step must not: zero_grad() is there to free them."""
    params = [*parameters((16, 512), (300,)), *parameters((16, 512), dtype=torch.bfloat16)]
    params.append(Parameter(torch.randn(512, 16).T))
    optimizer = optim.AdamW(params)
    with kernels.use_backend("reference"):
        for i in range(2):
            step(optimizer, params, i)
    alive = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    gc.collect()
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, backend: str) -> None:
    def run() -> tuple[list[Tensor], Parameter]:
        torch.manual_seed(0)
        p = Parameter(torch.randn(64, 256, dtype=torch.float32))
        p.grad = torch.randn(64, 256, dtype=torch.float32)
        other = torch.optim.AdamW([p])
        other.step()
        optimizer = optim.convert_(other)  # quantises its states
        optimizer.step()
        loaded = optim.LAMB([p])
        loaded.step()
        return [*optimizer.state[p].values(), *loaded.state[p].values()], p

    with kernels.use_backend(backend):
        expected, p = run()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            states, q = run()
        finally:
            torch.set_default_dtype(before)
    assert torch.equal(p, q)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, states, strict=True))


def test_the_default_device_changes_nothing() -> None:
    p = Parameter(torch.randn(64, 256))
    p.grad = torch.randn(64, 256)
    optimizer = optim.LAMB([p])
    with torch.device("meta"):
        optimizer.step()
    assert all(value.device.type == "cpu" for value in optimizer.state[p].values())
