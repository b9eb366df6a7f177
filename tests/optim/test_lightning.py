"""The optimizers under a Lightning Trainer: in 32 bits every run is torch.optim's, whatever the Trainer does to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.plugins import MixedPrecision
from support.quiet import quiet_trainer
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lowbit_lightning import optim

Configure = Callable[["Module"], Any]


class Module(L.LightningModule):
    """Learns a fixed linear map; ``configure`` makes its optimizers."""

    def __init__(self, configure: Configure, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.configure, self.automatic_optimization = configure, not manual
        self.losses: list[Tensor] = []

    def loss(self, x: Tensor) -> Tensor:
        loss = (self.net(x) - x.roll(1, 1)).square().mean()
        self.losses.append(loss.detach().clone())
        return loss

    def training_step(self, x: Tensor, index: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(x)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
            self.manual_backward(self.loss(x))
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
        for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
            scheduler.step()
        return None

    def validation_step(self, x: Tensor, index: int) -> None:
        self.log("val", (self.net(x) - x.roll(1, 1)).square().mean())

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def fit(module: Module, epochs: int = 3, checkpoint: Path | None = None, **options: Any) -> L.Trainer:
    trainer = quiet_trainer(max_epochs=epochs, **options)
    data: Any = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(data, batch_size=16), DataLoader(data[:32], batch_size=16), ckpt_path=checkpoint)
    return trainer


def adamw(library: Any, **options: Any) -> Configure:
    return lambda module: library.AdamW(module.parameters(), lr=3e-3, **options)


def same(runs: list[Module], tolerance: float = 1e-6) -> None:
    ours, theirs = runs
    a, b = torch.stack(ours.losses), torch.stack(theirs.losses)
    assert len(a) == len(b)
    assert (a - b).norm() <= tolerance * b.norm()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p - q).norm() <= tolerance * q.norm()


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4))


TRAINERS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "clipping by norm": lambda: {"gradient_clip_val": 0.05},
    "clipping by value": lambda: {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    "accumulation": lambda: {"accumulate_grad_batches": 2},
    "grad scaler": lambda: {"plugins": [scaler()]},
    "grad scaler and clipping": lambda: {"plugins": [scaler()], "gradient_clip_val": 0.05},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "weight averaging": lambda: {"callbacks": [callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1)]},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_is_torchs(name: str) -> None:
    runs = [Module(adamw(optim, bits=32)), Module(adamw(torch.optim))]
    for module in runs:
        fit(module, **TRAINERS[name]())
    # half precision turns differences in the last place of float32 into its own, now and then
    same(runs, tolerance=1e-3 if name in ("bf16-mixed", "grad scaler", "grad scaler and clipping") else 1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_in_8_bits_the_losses_stay_close(name: str) -> None:
    runs = [Module(adamw(optim)), Module(adamw(torch.optim))]
    for module in runs:
        fit(module, **TRAINERS[name]())
    a, b = (torch.stack(module.losses) for module in runs)
    assert (a / b - 1).abs().max() < 0.02


def test_a_moving_average_of_the_weights() -> None:
    """Its callback keeps a copy of the whole module, and puts it in place for validation and in the end."""
    average = getattr(callbacks, "EMAWeightAveraging", None)
    if average is None:
        pytest.skip("Lightning before 2.6 has no EMAWeightAveraging")
    runs = [Module(adamw(optim, bits=32)), Module(adamw(torch.optim))]
    trainers = [fit(module, callbacks=[average(decay=0.5)]) for module in runs]
    same(runs)
    ours, theirs = (float(trainer.callback_metrics["val"]) for trainer in trainers)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_several_optimizers_and_manual_optimization() -> None:
    def configure(library: Any, **options: Any) -> Configure:
        def make(module: Module) -> Any:
            first = library.SGD(module.net[0].parameters(), lr=0.1, momentum=0.9, **options)
            second = library.AdamW(module.net[2].parameters(), lr=3e-3, **options)
            return [first, second], [lr_scheduler.ExponentialLR(o, 0.9) for o in (first, second)]

        return make

    runs = [Module(configure(optim, bits=32), manual=True), Module(configure(torch.optim), manual=True)]
    for module in runs:
        fit(module)
    same(runs)


def test_converted_in_configure_optimizers_behind_a_scheduler() -> None:
    """Lightning warns where a scheduler steps and the optimizer did not."""

    def configure(convert: bool) -> Configure:
        def make(module: Module) -> Any:
            optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
            scheduler = lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=18)
            if convert:
                optim.convert_(optimizer, bits=32)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        return make

    runs = [Module(configure(True)), Module(configure(False))]
    for module in runs:
        trainer = fit(module)
    same(runs)
    assert type(trainer.optimizers[0]) is torch.optim.AdamW


@pytest.mark.parametrize("bits", [8, 32])
def test_a_resumed_run_is_the_one_that_ran_through(bits: int, tmp_path: Path) -> None:
    def configure(module: Module) -> Any:
        optimizer = optim.AdamW(optim.group_parameters(module, {"*.bias": {"weight_decay": 0.0}}), lr=3e-3, bits=bits)
        return [optimizer], [lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]

    through, stopped, resumed = Module(configure), Module(configure), Module(configure)
    fit(through, epochs=4)
    trainer = fit(stopped, epochs=2)
    path = tmp_path / "two.ckpt"
    trainer.save_checkpoint(path)
    fit(resumed, epochs=4, checkpoint=path)
    assert torch.equal(torch.stack(stopped.losses + resumed.losses), torch.stack(through.losses))
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), through.parameters(), strict=True))


def test_a_checkpoint_of_torchs_run_goes_on_in_8_bits(tmp_path: Path) -> None:
    """The optimizer is exchanged between two runs, and the losses go on."""
    through, stopped, resumed = Module(adamw(torch.optim)), Module(adamw(torch.optim)), Module(adamw(optim))
    fit(through, epochs=4)
    trainer = fit(stopped, epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    fit(resumed, epochs=4, checkpoint=tmp_path / "two.ckpt")
    a, b = torch.stack(resumed.losses), torch.stack(through.losses[-len(resumed.losses) :])
    assert (a / b - 1).abs().max() < 0.02
