"""The optimizers as torch's machinery sees them: groups, schedulers, scalers, layouts, copies."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import close, decoded, one_thread, parameters, step, twins, values
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler, swa_utils

from lowbit_lightning import kernels, optim
from lowbit_lightning.kernels.formats import BlockGrid

__all__ = ["one_thread"]  # a fixture


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


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # torch's own, in SequentialLR, until 2.8
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


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:an optimizer's parameters are not all contiguous")
@pytest.mark.parametrize("bits", [8, 32])
def test_any_memory_layout_gives_the_same(bits: int) -> None:
    """Non-contiguous and channels_last parameters and gradients; 0-d and empty ones beside them."""
    plain = parameters((16, 512), (8, 16, 6, 6), (), (0,), (0, 80))
    odd = twins(plain)
    odd[0] = Parameter(plain[0].detach().T.contiguous().T)
    odd[1] = Parameter(plain[1].detach().contiguous(memory_format=torch.channels_last))
    assert not odd[0].is_contiguous()
    assert not odd[1].is_contiguous()
    a, b = optim.AdamW(plain, bits=bits, min_size=64), optim.AdamW(odd, bits=bits, min_size=64)
    for i in range(4):
        step(a, plain, i)
        for p, q in zip(plain, odd, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        assert odd[1].grad is not None
        odd[1].grad = odd[1].grad.contiguous(memory_format=torch.channels_last)
        odd[0].grad = odd[0].grad.T.contiguous().T if i % 2 else odd[0].grad  # type: ignore[union-attr]
        b.step()
    for p, q in zip(plain, odd, strict=True):
        assert torch.equal(p, q)
        for name, x in a.state[p].items():
            assert torch.equal(x, b.state[q][name])
    assert not odd[0].is_contiguous()
    assert [float(a.state[p]["step"]) for p in plain] == [4] * 5


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


@pytest.mark.parametrize("bits", [8, 32])
def test_parameters_whose_data_was_replaced(bits: int) -> None:
    """By another tensor of the same shape: it is stepped on. Of another shape: the states no longer fit, and that is
    said."""
    (p,) = parameters((16, 512))
    q = twins([p])[0]
    a, b = optim.AdamW([p], bits=bits), optim.AdamW([q], bits=bits)
    for i in range(3):
        p.data = p.data.clone()
        step(a, [p], i)
        step(b, [q], i)
    assert torch.equal(p, q)
    for shape in ((8, 512), (16, 1024)):
        p.grad = None
        p.data = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"exp_avg\[0\] must have the parameter's shape"):
            step(a, [p])
        assert not p.any()


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alike(how: str) -> None:
    params = parameters((16, 512), (300,))
    optimizer = optim.AdamW(params)
    step(optimizer, params)
    if how == "deepcopy":
        twin = copy.deepcopy(optimizer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    copies = [p for group in twin.param_groups for p in group["params"]]
    assert all(p is not q for p, q in zip(params, copies, strict=True))
    for i in range(3):
        step(optimizer, params, i)
        step(twin, copies, i)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


# -- changing the form of the states in mid-run ------------------------------------------------------------------------


def frozen_states(bits: list[int], block_sizes: list[int]) -> tuple[optim.SGD, Parameter, list[dict[str, Tensor]]]:
    """A parameter's state after each change of form, by steps that change neither momentum nor parameter."""
    p = Parameter(torch.randn(37, 700))
    optimizer = optim.SGD([p], lr=1e-2, momentum=0.9, block_size=block_sizes[0], bits=bits[0])
    for i in range(3):
        step(optimizer, [p], i)
    states = [{k: v.clone() for k, v in optimizer.state[p].items()}]
    group = optimizer.param_groups[0]
    group.update(momentum=1.0, dampening=1.0, lr=0.0)  # buffer = 1 * buffer + 0 * g
    for group["bits"], group["block_size"] in zip(bits[1:], block_sizes[1:], strict=True):
        step(optimizer, [p])
        states.append({k: v.clone() for k, v in optimizer.state[p].items()})
    return optimizer, p, states


def test_8_to_32_to_8_bits_changes_no_code() -> None:
    _, _, states = frozen_states([8, 32, 8], [256, 256, 256])
    assert set(states[1]) == {"step", "momentum_buffer"}
    assert states[2].keys() == states[0].keys()
    for name in ("momentum_buffer_codes", "momentum_buffer_scales"):
        assert torch.equal(states[2][name], states[0][name])
    values_8 = kernels.dequantize_blockwise(states[0]["momentum_buffer_codes"], states[0]["momentum_buffer_scales"])
    assert torch.equal(states[1]["momentum_buffer"], values_8)


def test_another_block_size_requantises() -> None:
    optimizer, _, states = frozen_states([8, 8], [256, 64])
    assert states[1]["momentum_buffer_scales"].shape == BlockGrid.of((37, 700), 64).scales_shape
    assert optimizer.param_groups[0]["state_format"]["block_size"] == 64
    decoded_256 = kernels.dequantize_blockwise(states[0]["momentum_buffer_codes"], states[0]["momentum_buffer_scales"])
    expected = kernels.quantize_blockwise(decoded_256, "dynamic_signed", 64)
    assert torch.equal(states[1]["momentum_buffer_codes"], expected[0])
    assert torch.equal(states[1]["momentum_buffer_scales"], expected[1])


def test_a_run_with_changes_of_bits_stays_close() -> None:
    ours = parameters((16, 512))
    theirs = twins(ours)
    a, b = optim.AdamW(ours), torch.optim.AdamW(theirs)
    before = values(ours)[0]
    for i in range(30):
        a.param_groups[0]["bits"] = 32 if 10 <= i < 20 else 8
        step(a, ours, i)
        step(b, theirs, i)
        assert ("exp_avg" in a.state[ours[0]]) == (10 <= i < 20)
    moved = (theirs[0].detach() - before).norm()
    assert (ours[0].detach() - theirs[0].detach()).norm() < 0.05 * moved


# -- non-finite gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
def test_skip_nonfinite_skips_the_whole_step(bits: int) -> None:
    params = parameters((16, 512), (300,))
    optimizer = optim.AdamW([{"params": [params[0]]}, {"params": [params[1]]}], skip_nonfinite=True, bits=bits)
    step(optimizer, params, 1)
    before = copy.deepcopy((values(params), [dict(optimizer.state[p]) for p in params]))
    for bad in (math.nan, math.inf, -math.inf):
        for p in params:
            p.grad = torch.ones_like(p)
        params[1].grad[7] = bad  # type: ignore[index]
        optimizer.step()
    after = values(params), [dict(optimizer.state[p]) for p in params]
    assert all(torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    for old, new in zip(before[1], after[1], strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    step(optimizer, params, 2)
    assert all(float(optimizer.state[p]["step"]) == 2 for p in params)
    assert all((p.detach() != old).all() for p, old in zip(params, before[0], strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_stays_where_it_is(bad: float) -> None:
    """Its parameter becomes non-finite, as in torch; its states are zero; nothing else differs from a zero gradient."""
    (p,) = parameters((16, 512))
    q = twins([p])[0]
    a, b = optim.AdamW([p], weight_decay=0.0), optim.AdamW([q], weight_decay=0.0)
    for i in range(5):
        p.grad = torch.randn(16, 512)
        p.grad[2, 5] = 0.0
        q.grad = p.grad.clone()
        if i == 1:
            p.grad[2, 5] = bad
        a.step()
        b.step()
    assert not torch.isfinite(p.detach()[2, 5])
    others = torch.ones(16, 512, dtype=torch.bool)
    others[2, 5] = False
    assert torch.equal(p.detach()[others], q.detach()[others])
    for name, codebook in (("exp_avg", "dynamic_signed"), ("exp_avg_sq", "dynamic_unsigned")):
        assert torch.equal(decoded(a, p, name, codebook), decoded(b, q, name, codebook))
        assert decoded(a, p, name, codebook)[2, 5] == 0


def test_parameters_that_every_step_has_to_copy_are_warned_of_once() -> None:
    kernels.step._warn_of_copies.cache_clear()
    p = Parameter(torch.randn(64, 64).T)
    p.grad = torch.randn(64, 64)
    optimizer = optim.AdamW([p])
    with pytest.warns(UserWarning, match=r"not all contiguous .* every step copies"):
        optimizer.step()
    optimizer.step()


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
