"""Trains under torchrun, or alone without: ``[torchrun ...] sharded_strategy_torchrun.py FILE``.

Rank 0 writes the losses of all steps, the mean of all ranks, to FILE. Two nodes hold a copy of the model each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import lightning as L
from support.sharded_model import Net

from lowbit_lightning.strategies import ShardedStrategy


def main(target: Path) -> None:
    ranks, here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    model = Net(steps=4)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=here,
        num_nodes=ranks // here,
        strategy=ShardedStrategy(replicas=ranks // here, optimizer_bits=32) if ranks > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model)
    losses = model.mean_losses()
    trainer.save_checkpoint(target.with_suffix(".ckpt"))
    if trainer.is_global_zero:
        target.write_text(json.dumps({"losses": losses, "ranks": ranks, "nodes": trainer.num_nodes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
