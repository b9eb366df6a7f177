"""Runs that are stopped and resumed: noisy data, a model that notes its losses, and what compares them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lowbit_lightning import optim
from lowbit_lightning.callbacks import DeterministicResume
from lowbit_lightning.precision import Int8MixedPrecision
from support.quiet import quiet_trainer

SAMPLES, BATCH, EPOCHS = 36, 4, 3  # 9 batches an epoch


class Noisy(Dataset):
    """Augments with all three global generators, in whichever process loads."""

    def __init__(self, noise: bool = True, samples: int = SAMPLES) -> None:
        self.x = torch.randn(samples, 64, generator=torch.Generator().manual_seed(1))
        self.noise = noise
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        self.loaded.append(index)
        if not self.noise:
            return self.x[index]
        return self.x[index] + 0.1 * torch.randn(64) + 0.1 * np.random.rand() + 0.1 * random.random()


class Model(L.LightningModule):
    def __init__(self, loader: Any, validate: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.net = nn.Sequential(self.first, nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4))
        self.loader, self.validate = loader, validate
        self.losses: list[tuple[int, int, float]] = []

    def train_dataloader(self) -> Any:
        return self.loader() if callable(self.loader) else self.loader

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(samples=8), BATCH) if self.validate else []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.cat(list(batch.values())) if isinstance(batch, dict) else batch
        decay = np.random.rand() + random.random()
        loss = self.net(x).square().mean() + decay * self.first.weight.square().mean()
        self.losses.append((self.current_epoch, batch_idx, loss.item()))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = optim.AdamW(self.parameters(), lr=1e-2, min_size=1024)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class At(L.Callback):
    """Does something whenever ``hook`` is called at ``place``, an epoch and a batch or an epoch alone."""

    def __init__(self, hook: str, place: tuple[int, ...], act: Callable[[L.Trainer], None]) -> None:
        def acts(trainer: L.Trainer, *_: Any, **__: Any) -> None:
            if (trainer.current_epoch, trainer.fit_loop.batch_idx)[: len(place)] == place:
                act(trainer)

        setattr(self, hook, acts)


def interrupt(_: L.Trainer) -> None:
    """What a kill is: training ends in the middle, after whatever was saved before."""
    raise KeyboardInterrupt


def saving(path: Path) -> Callable[[L.Trainer], None]:
    return lambda trainer: trainer.save_checkpoint(path)


def stop_at(epoch: int, batch: int) -> L.Callback:
    return At("on_train_batch_start", (epoch, batch), interrupt)


def loader(**settings: Any) -> DataLoader:
    return DataLoader(Noisy(), BATCH, **{"shuffle": True, **settings})


def trainer(*callbacks: L.Callback, resumes: bool = True, **settings: Any) -> L.Trainer:
    """``resumes``: with DeterministicResume, unless there is one among the callbacks."""
    if resumes and not any(isinstance(c, DeterministicResume) for c in callbacks):
        callbacks = (DeterministicResume(), *callbacks)
    defaults: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 1,
        "plugins": Int8MixedPrecision(autocast="off"),
    }
    return quiet_trainer(callbacks=list(callbacks), **{**defaults, **settings})


def fit(make: Any, *callbacks: L.Callback, seed: int = 0, ckpt_path: Any = None, **settings: Any) -> tuple[Any, Any]:
    """The model and the trainer of a run in a "new process", which ``seed`` stands for."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    model = make if isinstance(make, Model) else Model(make)
    run = trainer(*callbacks, **settings)
    run.fit(model, ckpt_path=ckpt_path)
    return model, run


@cache
def through(make: Any, settings: tuple[tuple[str, Any], ...] = ()) -> Model:
    """The run that nothing stops."""
    return fit(make, **dict(settings))[0]


def resumed(make: Any, ckpt_path: Any, *callbacks: L.Callback, **settings: Any) -> Model:
    """What follows a checkpoint; its losses have to be those of the run that nothing stops."""
    found, _ = fit(make, *callbacks, seed=1234, ckpt_path=ckpt_path, **settings)
    expected = through(make, tuple(settings.items()))
    assert found.losses, "nothing was trained after the checkpoint"
    assert found.losses == expected.losses[-len(found.losses) :]  # with their epochs and batches
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    return found


def compare(
    tmp_path: Path,
    make: Any,
    save: dict[str, Any],
    stop: tuple[int, int],
    *resume: DeterministicResume,
    **settings: Any,
) -> Model:
    """Run, die at ``stop``, resume; compare each batch's loss with those of the run that nothing stops."""
    stopped: list[Any] = []

    def interrupt(trainer: L.Trainer) -> None:
        stopped.append(trainer.lightning_module)
        raise KeyboardInterrupt

    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, **save)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make, At("on_train_batch_start", stop, interrupt), checkpoint, **settings)
    assert stopped[0].losses == through(make, tuple(settings.items())).losses[: len(stopped[0].losses)]
    last = max(tmp_path.glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    assert "exp_avg_codes" in torch.load(last, weights_only=True)["optimizer_states"][0]["state"][0]
    return resumed(make, last, *resume, **settings)
