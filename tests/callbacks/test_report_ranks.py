"""RunReport on two ranks: rank 0 alone keeps and writes, its own bytes, and nobody waits for another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.on_ranks import on_ranks
from support.sharded_model import Net, trainer
from torch import Tensor

from lowbit_command.report.record import load
from lowbit_lightning import optim
from lowbit_lightning.callbacks import RunReport

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")


class Logging(Net):
    """Logs what has to be summed over the ranks."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.log("mean_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss, sync_dist=True)
        return loss

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


@on_ranks(2)
def test_only_rank_0_keeps_and_writes(folder: Path) -> None:
    report, model = RunReport(), Logging(optim.AdamW, steps=4)
    made = trainer(callbacks=[report], default_root_dir=folder / "good", limit_val_batches=1)
    made.fit(model)
    dist.barrier()
    assert (report.record is not None) == (dist.get_rank() == 0)
    record = load(folder / "good")
    assert record.status == "finished"
    assert not record.notes
    assert record.series["loss"].steps == [1, 2, 3, 4]
    assert record.series["val_loss"].last() is not None
    if dist.get_rank() == 0:
        assert record.series["loss"].mean == pytest.approx([float(x) for x in model.losses], rel=1e-4)
        local = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
        assert sum(row["bytes"] for row in record.memory if row["what"] == "float32") == local
        assert record.codes
    assert record.environment["world_size"] == 2
