"""Unscaling, clipping and skipping under an unmodified Trainer: inside the step where nobody looks, else by passes.

One step of plain SGD at a rate of 1 subtracts the gradient itself, so that float64 says what is right: the scaled
gradients are taken down when backward has just run.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.precision.amp import MixedPrecision as FabricMixedPrecision
from lightning.pytorch import plugins
from support.host_reads import reads
from support.quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning import optim, precision
from lowbit_lightning.precision import Int8MixedPrecision, _twins, in_step

QUESTION = "_optimizer_handles_unscaling"
SCALE = 1024.0
CLIP = 0.01


@pytest.fixture(autouse=True)
def _registered() -> None:
    precision.register()


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": SCALE, "growth_interval": 1000, **options})


class Module(L.LightningModule):
    """Learns a fixed linear map; ``overflow``: the batches whose loss is infinite."""

    def __init__(self, make: Callable[[Any], Any], overflow: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.make, self.overflow = make, overflow
        self.scaled: list[Tensor] = []
        self.old: list[Tensor] = []

    def loss(self, x: Tensor, index: int) -> Tensor:
        loss = (self.net(x) - x.roll(1, 1)).square().mean()
        return loss * (torch.inf if index in self.overflow else 1.0)

    def training_step(self, x: Tensor, index: int) -> Tensor | None:
        return self.loss(x, index)

    def on_after_backward(self) -> None:
        self.old = [p.detach().double() for p in self.net.parameters()]
        self.scaled = [p.grad.double() for p in self.net.parameters() if p.grad is not None]

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Hooked(Module):
    """Looks at the gradients."""

    seen: list[Tensor]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen = [p.grad.double() for p in self.net.parameters() if p.grad is not None]


class OwnClipping(Module):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])


class Watching(L.Callback):
    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen = [p.grad.double() for p in module.net.parameters() if p.grad is not None]


class Mixed(plugins.MixedPrecision):
    """A user's own plugin."""


def sgd(params: Any) -> Any:
    return optim.SGD(params, lr=1.0)


def fit(module: Module, batches: int = 1, checkpoint: Path | None = None, **options: Any) -> L.Trainer:
    trainer = quiet_trainer(limit_train_batches=batches, **options)
    data: Any = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(data, batch_size=16), ckpt_path=checkpoint)
    return trainer


def expected(scaled: list[Tensor], scale: float, algorithm: str | None) -> list[Tensor]:
    exact = [g / scale for g in scaled]
    if algorithm == "norm":
        norm = torch.stack([g.square().sum() for g in exact]).sum().sqrt()
        assert norm > CLIP
        return [g * CLIP / (norm + 1e-6) for g in exact]
    return [g.clamp(-CLIP / 10, CLIP / 10) for g in exact] if algorithm == "value" else exact


def clipping(algorithm: str | None) -> dict[str, Any]:
    if algorithm is None:
        return {}
    return {"gradient_clip_val": CLIP if algorithm == "norm" else CLIP / 10, "gradient_clip_algorithm": algorithm}


def check(module: Module, scale: float, algorithm: str | None) -> None:
    """The last step against float64."""
    right = expected(module.scaled, scale, algorithm)
    for p, old, g in zip(module.net.parameters(), module.old, right, strict=True):
        off = (p.detach().double() - (old - g)).abs()
        assert (off <= 1e-6 * (old.abs() + g.abs())).all(), f"off by {off.max():.1e}"


PRECISIONS: dict[str, tuple[Callable[[], dict[str, Any]], float]] = {
    "32-true": (dict, 1.0),
    "bf16-mixed": (lambda: {"precision": "bf16-mixed"}, 1.0),
    "int8-mixed": (lambda: {"precision": "int8-mixed"}, 1.0),
    "16-mixed": (lambda: {"plugins": [plugins.MixedPrecision("16-mixed", "cpu", scaler())]}, SCALE),
    "a subclass": (lambda: {"plugins": [Mixed("16-mixed", "cpu", scaler())]}, SCALE),
}
MODULES = {"plain": Module, "hooked": Hooked, "own clipping": OwnClipping}


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("kind", MODULES)
def test_a_step_is_right(kind: str, name: str, algorithm: str | None) -> None:
    options, scale = PRECISIONS[name]
    module = MODULES[kind](sgd)
    watching = Watching()
    fit(module, callbacks=[watching] if kind == "hooked" else [], **options(), **clipping(algorithm))
    check(module, scale, algorithm)
    if isinstance(module, Hooked):  # unscaled, and not yet clipped, as Lightning documents it
        for seen, also, g in zip(module.seen, watching.seen, module.scaled, strict=True):
            assert torch.equal(seen, also)
            assert torch.equal(seen, g / scale)
    if isinstance(module, OwnClipping) and algorithm == "norm":  # and clipped behind it
        assert float(module.norm) == pytest.approx(CLIP, rel=1e-3)


@pytest.mark.parametrize("algorithm", [None, "norm"])
@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "int8-mixed", "16-mixed"])
def test_where_nobody_looks_it_is_in_the_step(
    name: str, algorithm: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients stay as backward left them."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass over the gradients")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", never)
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", never)
    options, scale = PRECISIONS[name]
    module = Module(sgd)
    fit(module, **options(), **clipping(algorithm))
    check(module, scale, algorithm)
    for p, g in zip(module.net.parameters(), module.scaled, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad.double(), g)


@pytest.mark.parametrize("where", ["module", "callback", "optimizer", "own clipping"])
def test_where_somebody_looks_gradients_are_unscaled_and_clipped_for_them(where: str) -> None:
    seen = []

    def make(params: Any) -> Any:
        optimizer = sgd(params)
        if where == "optimizer":
            optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["params"][0].grad.clone()))
        return optimizer

    kinds: dict[str, type[Module]] = {"module": Hooked, "own clipping": OwnClipping}
    module = kinds.get(where, Module)(make)
    plugin = plugins.MixedPrecision("16-mixed", "cpu", scaler())
    fit(module, plugins=[plugin], callbacks=[Watching()] if where == "callback" else [], **clipping("norm"))
    check(module, SCALE, "norm")
    right = expected(module.scaled, SCALE, "norm")
    for p, g in zip(module.net.parameters(), right, strict=True):
        torch.testing.assert_close(p.grad.double(), g, rtol=1e-5, atol=0)  # type: ignore[union-attr]
    if where == "optimizer":
        torch.testing.assert_close(seen[0].double(), right[0], rtol=1e-5, atol=0)


def test_accumulated_gradients_are_unscaled_and_clipped_once() -> None:
    module = Module(sgd)
    plugin = plugins.MixedPrecision("16-mixed", "cpu", scaler())
    fit(module, batches=4, plugins=[plugin], accumulate_grad_batches=4, **clipping("norm"))
    check(module, SCALE, "norm")


@pytest.mark.parametrize("kind", ["plain", "hooked"])
@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_an_overflow_skips_the_step_and_lowers_the_scale(kind: str, algorithm: str | None) -> None:
    """The learning-rate scheduler goes on, as with Lightning's own skipping; counts don't."""

    def make(params: Any) -> Any:
        optimizer = optim.AdamW(params, lr=1.0)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]

    module = MODULES[kind](make, overflow=(0, 2))
    one = scaler()
    plugin = plugins.MixedPrecision("16-mixed", "cpu", one)
    trainer = fit(module, batches=3, plugins=[plugin], **clipping(algorithm))
    states = trainer.optimizers[0].state
    assert {float(states[p]["step"]) for p in module.parameters()} == {1.0}
    assert all(
        torch.equal(p.detach().double(), old) for p, old in zip(module.net.parameters(), module.old, strict=True)
    )
    assert one.get_scale() == SCALE / 4
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125
    assert trainer.global_step == 3


def test_the_host_reads_nothing_between_backward_and_the_end_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    original = torch.amp.GradScaler.step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        with reads() as found:
            result = original(self, *args, **kwargs)
        counts.append(found.count)
        return result

    monkeypatch.setattr(torch.amp.GradScaler, "step", counted)
    for make in (optim.AdamW, torch.optim.AdamW):
        fit(Module(make), batches=2, plugins=[plugins.MixedPrecision("16-mixed", "cpu", scaler())], **clipping("norm"))
    assert counts[:2] == [0, 0]
    assert all(counts[2:]), "what is counted here, torch's own optimizer has"


# -- manual optimization -----------------------------------------------------------------------------------------------


class Manual(Module):
    """Two optimizers; each clips its own gradients, and steps."""

    def __init__(self, algorithm: str | None) -> None:
        super().__init__(lambda _: None)
        self.automatic_optimization, self.algorithm = False, algorithm

    def configure_optimizers(self) -> Any:
        return [sgd(self.net[0].parameters()), sgd(self.net[2].parameters())]

    def training_step(self, x: Tensor, index: int) -> None:
        optimizers: Any = self.optimizers()
        self.manual_backward(self.loss(x, index))
        for optimizer in optimizers:
            options = clipping(self.algorithm)
            if options:
                self.clip_gradients(optimizer, **options)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
@pytest.mark.parametrize("name", ["32-true", "int8-mixed", "16-mixed"])
def test_manual_optimization(name: str, algorithm: str | None) -> None:
    """Lightning itself clips what is still scaled; here the unscaled gradient is clipped to what was asked for."""
    options, scale = PRECISIONS[name]
    module = Manual(algorithm)
    fit(module, **options())
    right = [*expected(module.scaled[:2], scale, algorithm), *expected(module.scaled[2:], scale, algorithm)]
    for p, old, g in zip(module.net.parameters(), module.old, right, strict=True):
        off = (p.detach().double() - (old - g)).abs()
        assert (off <= 1e-6 * (old.abs() + g.abs())).all(), f"off by {off.max():.1e}"


# -- what stays as it was ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_torchs_optimizers_get_what_lightning_does(name: str, algorithm: str | None) -> None:
    module = Module(lambda params: torch.optim.SGD(params, lr=1.0))
    options, scale = PRECISIONS[name]
    fit(module, **options(), **clipping(algorithm))
    check(module, scale, algorithm)
    for p, g in zip(module.net.parameters(), expected(module.scaled, scale, algorithm), strict=True):
        torch.testing.assert_close(p.grad.double(), g, rtol=1e-5, atol=0)  # type: ignore[union-attr]


def test_torchs_fused_optimizers_are_refused_clipping_as_ever() -> None:
    module = Module(lambda params: torch.optim.AdamW(params, fused=True))
    with pytest.raises(RuntimeError, match="AdamW, does not allow for gradient clipping"):
        fit(module, plugins=[plugins.MixedPrecision("16-mixed", "cpu", scaler())], **clipping("norm"))


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_step_without_a_loss_leaves_nothing_behind() -> None:
    class Empty(Module):
        def training_step(self, x: Tensor, index: int) -> Tensor | None:
            return None

    for options, _ in PRECISIONS.values():
        module = Empty(sgd)
        trainer = fit(module, **options(), **clipping("norm"))
        optimizer = trainer.optimizers[0]
        assert isinstance(optimizer, optim.LowBitOptimizer)
        assert optimizer._max_norm is None


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, plugins.Precision),
        ({"precision": "bf16-mixed"}, plugins.MixedPrecision),
        ({"precision": "bf16-true"}, plugins.HalfPrecision),
        ({"precision": "64-true"}, plugins.DoublePrecision),
    ],
)
def test_the_trainers_plugins_are_lightnings_by_class_and_name(options: dict[str, Any], kind: type) -> None:
    plugin = L.Trainer(accelerator="cpu", logger=False, **options).precision_plugin
    assert isinstance(plugin, kind)
    assert type(plugin).__qualname__ == kind.__qualname__, "checkpoints hold a plugin's state by this name"
    assert isinstance(plugin, in_step.InStep) == (kind is not plugins.DoublePrecision)
    assert type(pickle.loads(pickle.dumps(plugin))) is type(plugin)


def test_16_mixed_on_a_cpu_is_bf16_mixed_in_the_step() -> None:
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        plugin = L.Trainer(accelerator="cpu", logger=False, precision="16-mixed").precision_plugin
    assert type(plugin) is _twins.MixedPrecision
    assert plugin.precision == "bf16-mixed"
    assert isinstance(Int8MixedPrecision(), in_step.InStep)


def test_a_plugin_of_the_users_is_the_same_object() -> None:
    plugin = plugins.MixedPrecision("16-mixed", "cpu", scaler())
    trainer = L.Trainer(accelerator="cpu", logger=False, plugins=[plugin])
    assert trainer.precision_plugin is plugin
    assert trainer.strategy.precision_plugin is plugin


def test_a_scalers_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    module = Module(sgd, overflow=(1,))
    trainer = fit(module, batches=2, plugins=[plugins.MixedPrecision("16-mixed", "cpu", scaler())])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    one = scaler()
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["MixedPrecision"]["scale"] == SCALE / 2
    plugin = plugins.MixedPrecision("16-mixed", "cpu", one)
    fit(Module(sgd), 2, tmp_path / "a.ckpt", plugins=[plugin], max_epochs=2)
    assert one.get_scale() == SCALE / 2


@pytest.mark.parametrize("clip", [False, True])
def test_fabric(clip: bool) -> None:
    torch.manual_seed(0)
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=[FabricMixedPrecision("16-mixed", "cpu", scaler())])
    model = nn.Linear(64, 64)
    module, optimizer = fabric.setup(model, optim.SGD(model.parameters(), lr=1.0))
    old = [p.detach().double() for p in model.parameters()]
    fabric.backward(module(torch.randn(8, 64)).square().mean())
    scaled = [p.grad.double() for p in model.parameters() if p.grad is not None]
    if clip:
        fabric.clip_gradients(module, optimizer, max_norm=CLIP)
    optimizer.step()
    for p, x, g in zip(model.parameters(), old, expected(scaled, SCALE, "norm" if clip else None), strict=True):
        torch.testing.assert_close(p.detach().double(), x - g, rtol=0, atol=1e-6)


def test_the_question_is_answered_once_and_for_ours_alone() -> None:
    """In every module of Lightning that asks it."""
    in_step.allow_clipping()
    p = nn.Parameter(torch.zeros(3))
    asking = [m for name, m in sys.modules.items() if name.startswith("lightning.") and hasattr(m, QUESTION)]
    assert len(asking) >= 4
    for module in asking:
        asked = getattr(module, QUESTION)
        assert not hasattr(asked.__wrapped__, "__wrapped__")  # type: ignore[attr-defined]
        assert asked(torch.optim.AdamW([p], fused=True))
        assert not asked(torch.optim.AdamW([p]))
        assert not asked(optim.AdamW([p]))
