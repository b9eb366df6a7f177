"""Two ranks on gloo, started by Lightning, which runs this file again for the second: LowBitMonitor on both.

Both measure under DDP, then under FSDP2; rank 1's data has an outlier feature. With a second argument, what each would
measure alone.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import Int8MixedPrecision, convert, optim
from lowbit_lightning.callbacks import LowBitMonitor


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 2))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            convert.swap_linears(self)  # first: a layer that fully_shard has changed is no plain nn.Linear
            for layer in (*self.net, self):
                assert self.device_mesh is not None
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).float().square().mean()

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), lr=0.0, min_size=1024)  # a model that stands still


def data(rank: int) -> DataLoader:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(rank))
    if rank:
        x[:, 3] *= 100
    return DataLoader(TensorDataset(x), 16)


def fit(rank: int | None, folder: Path, **settings: Any) -> tuple[Model, LowBitMonitor, L.Trainer]:
    """``rank`` None: each rank with its own data."""
    model, monitor = Model(), LowBitMonitor(1, minimum_snr=35, patience=2, fallback=True, per_layer=True)
    trainer = L.Trainer(
        precision="int8-mixed",  # type: ignore[arg-type]
        accelerator="cpu",
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=[monitor],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, data(trainer.global_rank if rank is None else rank))
    return model, monitor, trainer


def measured(monitor: LowBitMonitor) -> dict[str, float]:
    wanted = ("/snr/", "/optimizer/")
    return {name: value.item() for name, value in monitor.metrics.items() if any(part in name for part in wanted)}


def alone(folder: Path) -> None:
    ranks = [measured(fit(rank, folder, devices=1)[1]) for rank in (0, 1)]
    (folder / "alone.json").write_text(json.dumps(ranks))


def together(folder: Path) -> None:
    kept: Any = lambda plugin: None  # noqa: E731
    Int8MixedPrecision.release_layers = kept  # type: ignore[method-assign]  # layers are looked at after
    model, monitor, trainer = fit(None, folder, strategy="ddp", devices=2)
    result: dict[str, Any] = {
        "replicated": measured(monitor),
        "fallen_back": monitor.fallen_back,
        "products": list(vars(model.net[0].products).values()),
    }
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    result["sharded"] = measured(fit(None, folder, strategy=sharded, devices=2)[1])
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    (alone if len(sys.argv) > 2 else together)(Path(sys.argv[1]))
