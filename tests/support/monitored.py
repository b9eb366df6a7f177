"""A model with int8 layers, and a Trainer for it, that the tests of LowBitMonitor share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import Int8MixedPrecision, optim
from lowbit_lightning.callbacks import LowBitMonitor
from support.quiet import quiet_trainer

FEATURES, BATCH, BATCHES = 64, 16, 6


class Model(L.LightningModule):
    """Two int8 layers; ``spike`` multiplies one feature of what enters the second."""

    def __init__(self, spike: float = 1.0, run: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(FEATURES, 128), nn.Linear(128, FEATURES), nn.Linear(FEATURES, 4)
        self.spike, self.run = spike, run
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x) if self.run is None else self.run(self.up, x)
        scale = torch.ones(128).index_fill(0, torch.tensor(5), self.spike)
        return self.head(self.down(input=hidden * scale))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self(batch[0]).float().square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), lr=1e-3, min_size=1024)


class Validated(Model):
    """Validates on data with outliers."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(4, FEATURES) * (1 + 1e4 * torch.eye(4, FEATURES))), 4)


def data() -> DataLoader:
    x = torch.randn(BATCHES * BATCH, FEATURES, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), BATCH)


def fit(
    model: Model,
    folder: Path,
    *callbacks: Callback,
    precision: dict[str, Any] | None = None,
    ckpt_path: Any = None,
    **settings: Any,
) -> L.Trainer:
    trainer = quiet_trainer(
        plugins=[Int8MixedPrecision(**{"autocast": "off", **(precision or {})})],
        callbacks=list(callbacks),
        default_root_dir=folder,
        **{"max_epochs": None, "max_steps": BATCHES, "log_every_n_steps": 1, **settings},
    )
    torch.manual_seed(2)  # for gradients that are rounded at random
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    return trainer


def quiet(every_n_steps: int = 1, **settings: Any) -> LowBitMonitor:
    return LowBitMonitor(every_n_steps, **{"picture": False, "minimum_snr": None, **settings})


def ours(seen: pytest.WarningsRecorder) -> int:
    return sum("LowBitMonitor" in str(w.message) for w in seen)
