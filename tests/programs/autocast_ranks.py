"""Two ranks whose processors seem to differ in what is faster: ``autocast_ranks.py FOLDER``, which Lightning runs again
for the second. Each writes the dtypes that its output layer computed in."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lowbit_lightning  # noqa: F401 (the string)
from lowbit_lightning.precision import autocast

RANK = int(os.environ.get("LOCAL_RANK", 0))
autocast.computes_in_bf16 = lambda device: RANK == 0  # type: ignore[assignment]
autocast.seconds = lambda shapes: (2.0, 1.0) if RANK == 0 else (1.0, 2.0)  # type: ignore[assignment]


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.dtypes: set[str] = set()

    def training_step(self, x: Tensor, index: int) -> Tensor:
        y = self.head(self.net(x))
        self.dtypes.add(str(y.dtype))
        return y.float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    model = Model()
    trainer = L.Trainer(
        precision="int8-mixed",  # type: ignore[arg-type]
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(torch.ones(8, 32), batch_size=4))  # type: ignore[arg-type]
    (Path(sys.argv[1]) / f"rank{RANK}.json").write_text(json.dumps(sorted(model.dtypes)))
