"""LowBitMonitor on two ranks, under DDP and under FSDP2; rank 1's data has an outlier feature."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from support.on_ranks import ALONE, on_ranks
from support.quiet import quiet_trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import Int8MixedPrecision, convert, optim
from lowbit_lightning.callbacks import LowBitMonitor

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")


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
    settings |= {"precision": "int8-mixed", "use_distributed_sampler": False, "default_root_dir": folder}
    trainer = quiet_trainer(callbacks=[monitor], **settings)
    trainer.fit(model, data(trainer.global_rank if rank is None else rank))
    return model, monitor, trainer


def measured(monitor: LowBitMonitor) -> dict[str, float]:
    wanted = ("/snr/", "/optimizer/")
    return {name: value.item() for name, value in monitor.metrics.items() if any(part in name for part in wanted)}


@on_ranks(ALONE, 2)
def test_ranks_agree(folder: Path) -> None:
    """Both report the same: the means of what each would measure alone, and the layer that both turn back."""
    path = folder / "alone.json"
    if not dist.is_initialized():
        path.write_text(json.dumps([measured(fit(rank, folder, devices=1)[1]) for rank in (0, 1)]))
        return
    with mock.patch.object(Int8MixedPrecision, "release_layers"):  # layers are looked at after
        model, monitor, _ = fit(None, folder, strategy="ddp", devices=2)
        sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        replicated, cut = measured(monitor), measured(fit(None, folder, strategy=sharded, devices=2)[1])
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, (replicated, cut, monitor.rotated))
    assert ranks[0] == ranks[1]
    alone, outlier = json.loads(path.read_text()), "int8/forward/snr/net.0"
    assert alone[0][outlier] - alone[1][outlier] > 20  # decibels, and the mean is taken for each operand
    means = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0] if "/snr/" in name}
    assert {name: value for name, value in replicated.items() if "/snr/" in name} == pytest.approx(means, abs=1)
    assert 0 < cut["int8/optimizer/exp_avg/largest"] < 0.1
    assert cut == pytest.approx(replicated, abs=1e-3)
    assert monitor.rotated == {"net.0": ["forward"]}
    assert list(vars(model.net[0].products).values())[:3] == ["hadamard", "int8", "int8"]
    dist.barrier()
    assert (folder / "int8_snr.png").exists()
