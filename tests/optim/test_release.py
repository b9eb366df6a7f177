"""``release_gradients``: the ordinary step's numbers to the bit, with one gradient alive at a time."""

from __future__ import annotations

import copy
import sys
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from support.fake_ranks import being_rank
from support.optimizers import parameters
from support.quiet import quiet_trainer
from support.run_program import run
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lowbit_lightning import optim

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("AdamW", {"bits": 32}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "lr": 1e-3}),
    ("Adagrad", {}),
    ("Lion", {}),
    ("LAMB", {}),
    ("LARS", {}),
    ("AdEMAMix", {"t_alpha": 3, "t_beta3": 3}),
]


class Net(nn.Module):
    """With a tied weight, a frozen layer, and a parameter that is used in every other step only."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(70, 64)
        self.frozen = nn.Linear(64, 64)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.sometimes = nn.Parameter(torch.zeros(64))
        self.head = nn.Linear(64, 70, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.to(dtype)

    def loss(self, step: int) -> Tensor:
        tokens = torch.randint(0, 70, (8, 16), generator=torch.Generator().manual_seed(step))
        x = self.frozen(self.embed(tokens))
        x = x + self.body(x) + (self.sometimes if step % 2 else 0.0)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), tokens.roll(1, 1).flatten())


def train(net: Net, optimizer: Any, steps: range, scheduler: Any = None) -> list[float]:
    losses = []
    for i in steps:
        loss = net.loss(i)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def groups(net: Net) -> list[dict[str, Any]]:
    return optim.group_parameters(net, {"embed*": {"lr": 1e-3}, "*.bias": {"weight_decay": 0.0}})


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_losses_and_parameters_are_the_ordinary_ones_to_the_bit(kind: str, options: dict[str, Any]) -> None:
    plain, released = Net(), Net()
    a = getattr(optim, kind)(groups(plain), **options)
    b = getattr(optim, kind)(groups(released), **options)
    schedules = [lr_scheduler.ExponentialLR(o, 0.8) for o in (a, b)]
    optim.release_gradients(released, b)
    assert train(plain, a, range(6), schedules[0]) == train(released, b, range(6), schedules[1])
    assert same(plain, released)
    assert set(b.state) == {p for p in released.parameters() if p.requires_grad}
    for p, q in zip(plain.parameters(), released.parameters(), strict=True):
        assert a.state.get(p, {}).keys() == b.state.get(q, {}).keys()
        assert all(torch.equal(x, b.state[q][key]) for key, x in a.state.get(p, {}).items())
        assert q.grad is None


def test_random_rounding_is_the_same_too() -> None:
    """Its words are keyed by a parameter's place among all, which the hook has to know."""
    plain, released = Net(torch.bfloat16), Net(torch.bfloat16)
    a, b = (optim.AdamW(groups(net), stochastic_rounding=True, seed=5) for net in (plain, released))
    optim.release_gradients(released, b)
    assert train(plain, a, range(4)) == train(released, b, range(4))
    assert same(plain, released)


def test_closures() -> None:
    """Lightning runs backward inside ``step``."""
    plain, released = Net(), Net()
    a, b = optim.AdamW(groups(plain)), optim.AdamW(groups(released))
    optim.release_gradients(released, b)
    for i in range(4):
        for net, optimizer in ((plain, a), (released, b)):

            def closure(net: Net = net, optimizer: Any = optimizer, i: int = i) -> Tensor:
                optimizer.zero_grad()
                loss = net.loss(i)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert same(plain, released)


def test_resuming_and_changing_groups_in_mid_run() -> None:
    """``load_state_dict`` makes new groups, and a scheduler or the user changes them."""
    plain, released = Net(), Net()
    a, b = optim.AdamW(groups(plain)), optim.AdamW(groups(released))
    optim.release_gradients(released, b)
    saved = copy.deepcopy(a.state_dict())
    for net, optimizer in ((plain, a), (released, b)):
        train(net, optimizer, range(3))
        optimizer.load_state_dict(copy.deepcopy(saved))
        optimizer.param_groups[0]["lr"] = 0.05
        train(net, optimizer, range(3, 6))
    assert same(plain, released)


def test_a_group_that_comes_later_is_updated_by_step() -> None:
    net = Net()
    optimizer = optim.SGD(net.body.parameters(), lr=0.1)
    optim.release_gradients(net, optimizer)
    optimizer.add_param_group({"params": [net.sometimes]})
    before = net.sometimes.detach().clone()
    net.loss(1).backward()
    assert net.body[0].weight.grad is None
    assert net.sometimes.grad is not None
    optimizer.step()
    assert not torch.equal(net.sometimes, before)


def test_remove_goes_back_to_ordinary_steps() -> None:
    plain, released = Net(), Net()
    a, b = optim.AdamW(groups(plain)), optim.AdamW(groups(released))
    handle = optim.release_gradients(released, b)
    train(plain, a, range(2))
    train(released, b, range(2))
    handle.remove()
    handle.remove()  # twice is no harm
    before = copy.deepcopy(released)
    released.loss(2).backward()
    assert same(before, released)
    assert all(p.grad is not None for p in released.body.parameters())
    b.step()
    b.zero_grad()
    train(plain, a, range(2, 3))
    train(plain, a, range(3, 5))
    train(released, b, range(3, 5))
    assert same(plain, released)


# -- memory ------------------------------------------------------------------------------------------------------------


class Counter:
    """Bytes of parameters' gradients that are alive when one has just been completed, and after backward."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.alive: list[weakref.ref[Tensor]] = []
        self.peak = 0
        for p in params:
            p.register_post_accumulate_grad_hook(self.see)

    def see(self, p: Tensor) -> None:
        assert p.grad is not None
        self.alive.append(weakref.ref(p.grad))
        self.peak = max(self.peak, self.bytes())

    def bytes(self) -> int:
        grads = [g for g in (r() for r in self.alive) if g is not None]
        return sum(g.numel() * g.element_size() for g in grads)


@pytest.mark.parametrize("kind", ["AdamW", "LAMB"])
def test_peak_gradient_memory_is_that_of_the_largest_parameter(kind: str) -> None:
    peaks = []
    for release in (False, True):
        net = Net()
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = getattr(optim, kind)(trained)
        counter = Counter(trained)
        if release:
            optim.release_gradients(net, optimizer)
        for i in (1, 3):
            net.loss(i).backward()
            assert (counter.bytes() == 0) == release
            optimizer.step()
            optimizer.zero_grad()
            assert counter.bytes() == 0
        peaks.append(counter.peak)
    sizes = [4 * p.numel() for p in trained]
    assert peaks == [sum(sizes), max(sizes)]


# -- refused -----------------------------------------------------------------------------------------------------------


def test_other_optimizers_are_refused() -> None:
    params = parameters((3,))
    with pytest.raises(TypeError, match=r"one of lowbit_lightning\.optim, got AdamW; see convert_"):
        optim.release_gradients(nn.Linear(1, 1), torch.optim.AdamW(params))  # type: ignore[arg-type]


def test_skip_nonfinite_is_refused() -> None:
    params = parameters((3,), (3,))
    optimizer = optim.AdamW([{"params": params[:1]}, {"params": params[1:], "skip_nonfinite": True}])
    with pytest.raises(ValueError, match="skip_nonfinite=True looks at all gradients"):
        optim.release_gradients(nn.Linear(1, 1), optimizer)
    assert not params[0]._post_accumulate_grad_hooks


def test_accumulation_is_refused_in_backward() -> None:
    net = Net()
    optimizer = optim.AdamW(groups(net))
    optim.release_gradients(net, optimizer)
    net.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"second gradient before optimizer\.step\(\): accumulation"):
        net.loss(1).backward()
    optimizer.step()
    optimizer.zero_grad()
    train(net, optimizer, range(2))  # and goes on


def test_ranks_that_average_gradients_after_backward_are_refused() -> None:
    net = Net()
    said = "with 2 ranks the gradients of plain parameters are averaged after backward"
    with being_rank(0, (2,)), pytest.raises(ValueError, match=said):
        optim.release_gradients(net, optim.AdamW(net.parameters()))


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")
def test_under_fsdp2_it_is_the_ordinary_step_too(tmp_path: Path) -> None:
    """There gradients are averaged, and cut, before they are accumulated."""
    run("released_gradients.py", tmp_path)


# -- under Lightning ---------------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    def __init__(self, release: bool) -> None:
        super().__init__()
        self.net, self.release = Net(), release
        self.losses: list[Tensor] = []
        self.counter: Counter | None = None

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.net.loss(index)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = optim.AdamW(groups(self.net))
        self.counter = Counter([p for p in self.net.parameters() if p.requires_grad])
        if self.release:
            optim.release_gradients(self, optimizer)
        return [optimizer], [lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def fit(release: bool, **options: Any) -> Module:
    module = Module(release)
    trainer = quiet_trainer(max_epochs=2, limit_train_batches=4, **options)
    trainer.fit(module, DataLoader(torch.zeros(4, 1)))  # type: ignore[arg-type]
    assert trainer.global_step == 8
    return module


def test_a_trainers_run_is_the_same_to_the_bit() -> None:
    plain, released = fit(False), fit(True)
    assert len(plain.losses) == 8
    assert torch.equal(torch.stack(plain.losses), torch.stack(released.losses))
    assert same(plain, released)
    assert plain.counter is not None
    assert released.counter is not None
    assert released.counter.peak == max(4 * p.numel() for p in released.net.parameters()) < plain.counter.peak


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gradient_clip_val": 0.5}, "gradient_clip_val=0.5 needs all gradients at once"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2 keeps gradients"),
    ],
)
def test_what_a_trainer_does_with_gradients_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fit(True, **options)


def test_a_trainers_scaler_is_refused() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="a GradScaler unscales all gradients before the step"):
        fit(True, plugins=[plugin])


def test_a_trainer_that_starts_to_accumulate_later_is_stopped() -> None:
    with pytest.raises(RuntimeError, match="second gradient before"):
        fit(True, callbacks=[GradientAccumulationScheduler({1: 2})])
