"""``convert_``: a torch.optim optimizer becomes its low-bit twin in mid-run, and all that holds on to it goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.optimizers import COPIES, copied, parameters, step, twins
from support.torch_runs import KINDS, SHAPES, Run, name
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook

from lowbit_lightning import optim

# -- states and groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=name)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("before", [0, 15])
def test_the_loss_curve_goes_on(kind: str, options: dict[str, Any], bits: int, before: int) -> None:
    run, torchs = Run(kind, **options), Run(kind, **options)
    assert torch.equal(run.steps(before), torchs.steps(before)) if before else True
    optim.convert_(run.optimizer, bits)
    ours, theirs = run.steps(25), torchs.steps(25)
    if bits == 32:
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
        for p, q in zip(run.model.parameters(), torchs.model.parameters(), strict=True):
            assert (p - q).norm() <= 1e-6 * q.norm()
    else:
        assert (ours / theirs - 1).abs().max() < 0.01
        coded = any(state_name.endswith("_codes") for state_name in run.optimizer.state[run.model[0].weight])
        assert coded == (kind != "SGD" or "momentum" in options)


def test_the_same_object_and_groups() -> None:
    params = parameters(*SHAPES)
    wanted: list[dict[str, Any]] = [
        {"params": params[:1], "lr": 0.5, "bits": 32, "own": "key"},
        {"params": params[1:]},
    ]
    theirs: Any = torch.optim.AdamW(wanted)
    groups, state = theirs.param_groups, theirs.state
    before = [dict(group) for group in groups]
    ours = optim.convert_(theirs, block_size=64, seed=3)
    assert ours is theirs
    assert type(ours) is optim.AdamW
    assert ours.param_groups is groups
    assert ours.state is state
    for group, old in zip(groups, before, strict=True):
        assert {k: group[k] for k in old} == old
        assert group["block_size"] == 64
    assert [group["bits"] for group in groups] == [32, 8]  # a group's own key wins
    assert ours.defaults["seed"] == 3
    assert ours.defaults["betas"] == (0.9, 0.999)
    step(ours, params)
    assert "exp_avg" in ours.state[params[0]]
    (late,) = parameters((16, 512))
    ours.add_param_group({"params": [late]})
    step(ours, [late])
    assert ours.state[late]["exp_avg_codes"].dtype == torch.uint8
    assert ours.param_groups[2]["block_size"] == 64
    assert repr(ours).startswith("AdamW")


@pytest.mark.parametrize("tensor", [False, True])
def test_a_learning_rate_is_kept_as_it_is(tensor: bool) -> None:
    lr: Any = torch.tensor(0.01) if tensor else 0.01
    params = parameters(*SHAPES)
    others = twins(params)
    ours = optim.convert_(torch.optim.Adam(params, lr=lr), bits=32)
    theirs = torch.optim.Adam(others, lr=0.01)
    assert ours.param_groups[0]["lr"] is lr
    for i in range(3):
        step(ours, params, i)
        step(theirs, others, i)
    for p, q in zip(params, others, strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm()


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_frozen_and_gradient_less_parameters(kind: str) -> None:
    params = parameters(*SHAPES)
    params[1].requires_grad_(False)
    theirs = getattr(torch.optim, kind)(params, lr=0.01, **({"momentum": 0.9} if kind == "SGD" else {}))
    step(theirs, params[:1])
    ours = optim.convert_(theirs)
    frozen = params[1].detach().clone()
    step(ours, params[:1], 1)
    step(ours, [params[0], params[2]], 2)
    assert torch.equal(params[1], frozen)
    assert all(torch.isfinite(p).all() for p in params)


# -- schedulers and hooks ----------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=30),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=6), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[6]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.3, total_iters=6), lr_scheduler.StepLR(o, 4)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=4, cycle_momentum="momentum" in o.defaults),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=8),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("kind", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9, "lr": 0.01})], ids=name)
def test_schedulers_from_before_go_on(scheduler: str, kind: str, options: dict[str, Any]) -> None:
    """They hold on to the old ``step``: silently, no low-bit step would ever run."""
    run, torchs = Run(kind, **options), Run(kind, **options)
    ours, theirs = SCHEDULERS[scheduler](run.optimizer), SCHEDULERS[scheduler](torchs.optimizer)
    for i in range(20):
        if i == 7:
            optim.convert_(run.optimizer, bits=32)
        losses = run.steps(1), torchs.steps(1)
        assert (losses[0] - losses[1]).abs() <= 1e-6 * losses[1]
        for s in (ours, theirs):
            s.step(1.0) if scheduler == "ReduceLROnPlateau" else s.step()
        for key in ("lr", "betas", "momentum"):
            assert run.optimizer.param_groups[0].get(key) == torchs.optimizer.param_groups[0].get(key)
    first = run.model[0].weight
    buffer = "momentum_buffer" if kind == "SGD" else "exp_avg"
    run.optimizer.param_groups[0]["bits"] = 8
    run.steps(1)
    assert f"{buffer}_codes" in run.optimizer.state[first]  # it is our step that runs


def test_a_scheduler_after_and_its_checkpoint() -> None:
    run = Run("AdamW")
    first = lr_scheduler.StepLR(run.optimizer, 2)
    optim.convert_(run.optimizer)
    second = lr_scheduler.ExponentialLR(run.optimizer, 0.5)
    run.steps(1)
    first.step()
    second.step()
    again = lr_scheduler.StepLR(Run("AdamW").optimizer, 2)
    again.load_state_dict(first.state_dict())
    assert again.last_epoch == 1


@pytest.fixture
def events() -> Iterator[list[str]]:
    seen: list[str] = []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("global"))
    yield seen
    handle.remove()


@pytest.mark.parametrize("scheduled", [False, True])
def test_hooks_from_before_go_on(events: list[str], scheduled: bool) -> None:
    (p,) = parameters((16, 512))
    optimizer = torch.optim.AdamW([p])
    optimizer.register_step_pre_hook(lambda *_: events.append("before"))
    handle = optimizer.register_step_post_hook(lambda *_: events.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: events.append("saved"))
    if scheduled:
        lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    optim.convert_(optimizer)
    step(optimizer, [p])
    assert events == ["before", "after", "global"]
    handle.remove()
    optimizer.state_dict()
    step(optimizer, [p])
    assert events == ["before", "after", "global", "saved", "before", "global"]
    loss = optimizer.step(lambda: torch.tensor(3.0))  # type: ignore[arg-type]
    assert loss == 3.0


def test_nothing_keeps_a_converted_optimizer_alive() -> None:
    (p,) = parameters((16, 512))
    optimizer = torch.optim.AdamW([p])
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    optim.convert_(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer, scheduler
    assert gone() is None


def test_a_grad_scaler_after_a_fused_optimizer() -> None:
    """Both unscale in their step, ours without writing the gradients."""
    run, torchs = Run("AdamW", fused=True), Run("AdamW")
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=1000)
    run.optimizer.zero_grad()
    scaler.scale(run.loss()).backward()
    scaler.step(run.optimizer)
    scaler.update()
    torchs.steps(1)
    optim.convert_(run.optimizer, bits=32)
    for i in range(5):
        run.optimizer.zero_grad()
        loss = run.loss()
        scaler.scale(loss * (float("inf") if i == 2 else 1.0)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        if i == 2:
            torchs.loss()
        else:
            torchs.steps(1)
    assert scaler.get_scale() == 2048.0
    assert float(run.optimizer.state[run.model[0].weight]["step"]) == 5
    for p, q in zip(run.model.parameters(), torchs.model.parameters(), strict=True):
        assert (p - q).norm() <= 1e-5 * q.norm()


# -- refused, and then nothing has changed -----------------------------------------------------------------------------


class Shouting(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


REFUSED: list[tuple[Callable[[list[Any]], Any], dict[str, Any], type[Exception], str]] = [
    (Shouting, {}, TypeError, r"exactly one of .*torch\.optim\.AdamW.*Shouting; a subclass may"),
    (torch.optim.Adadelta, {}, TypeError, r"got torch\.optim\.adadelta\.Adadelta"),
    (torch.optim.LBFGS, {}, TypeError, r"got torch\.optim\.lbfgs\.LBFGS"),
    (optim.AdamW, {}, TypeError, r"got lowbit_lightning\.optim\.family\.AdamW"),
    (torch.optim.AdamW, {"bits": 3}, ValueError, "bits must be 8 or 32, got 3"),
    (torch.optim.AdamW, {"block_size": 7}, ValueError, "block_size must be a power of two"),
    (torch.optim.AdamW, {"bitz": 8}, TypeError, "unknown options .'bitz'."),
    (torch.optim.AdamW, {"maximize": True}, ValueError, "maximize is a key of the optimizer's groups"),
    (lambda ps: torch.optim.AdamW(ps, differentiable=True), {}, ValueError, "differentiable=True"),
    (lambda ps: torch.optim.AdamW([*ps, torch.zeros(3, dtype=torch.float64)]), {}, TypeError, r"params\[3\] must be"),
]


@pytest.mark.parametrize(("make", "options", "error", "text"), REFUSED)
def test_refusals_change_nothing(make: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    params = parameters(*SHAPES)
    optimizer = make(params)
    kind = type(optimizer)
    for p in params:
        p.grad = torch.randn(p.shape)
    if kind in (torch.optim.AdamW, Shouting) and not optimizer.defaults["differentiable"]:
        optimizer.step()
    attributes = dict(vars(optimizer))
    groups = [dict(group) for group in optimizer.param_groups]
    states = {p: dict(s) for p, s in optimizer.state.items()}
    with pytest.raises(error, match=text):
        optim.convert_(optimizer, **options)
    assert type(optimizer) is kind
    assert vars(optimizer) == attributes
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert {p: dict(s) for p, s in optimizer.state.items()} == states


def test_malformed_states_change_nothing() -> None:
    params = parameters(*SHAPES)
    optimizer = torch.optim.AdamW(params)
    step(optimizer, params)
    states = {p: dict(s) for p, s in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    del optimizer.state[params[2]]["exp_avg_sq"]
    with pytest.raises(ValueError, match="holds neither exp_avg_sq"):
        optim.convert_(optimizer)
    assert type(optimizer) is torch.optim.AdamW
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert all(optimizer.state[p] == states[p] for p in params[:2])


def test_a_step_that_something_else_replaced_is_not_thrown_away() -> None:
    (p,) = parameters((16, 512))
    optimizer = torch.optim.AdamW([p])
    plain = optimizer.step
    optimizer.step = lambda closure=None: plain(closure)  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError, match=r"optimizer\.step was replaced"):
        optim.convert_(optimizer)
    assert type(optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("option", [{"stochastic_rounding": True}, {"master": "bf16+8"}])
def test_options_without_effect_warn(option: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=f"{next(iter(option))} has no effect"):
        optim.convert_(torch.optim.AdamW(parameters((3,))), **option)


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("bits", [8, 32])
def test_copies_of_the_converted_go_on(how: str, bits: int) -> None:
    params = parameters(*SHAPES)
    theirs = torch.optim.AdamW(params)
    lr_scheduler.LambdaLR(theirs, lambda t: 1.0)
    step(theirs, params)
    ours: Any = optim.convert_(theirs, bits=bits)
    step(ours, params, 1)
    twin = copied(ours, how)
    assert type(twin) is optim.AdamW
    copies = twin.param_groups[0]["params"]
    for i in range(3):
        step(ours, params, i)
        step(twin, copies, i)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    assert all(p is not q for p, q in zip(params, copies, strict=True))
