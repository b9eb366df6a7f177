"""``kill -9`` while checkpoints are saved: ``sharded_strategy_kill.py FOLDER ROUNDS``; exits with 0 where all is right.

Two ranks train and save after each step, to the same path, until the parent kills one of them or both, at a random
moment. After step n every weight is n and so is the optimizer's count: what loads must be of one piece, and not
older than the last save that had returned. The next round resumes from it.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.multiprocessing as mp
from support.ranks import join
from support.sharded_model import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning import optim
from lowbit_lightning.strategies import AtomicCheckpointIO, ShardedStrategy


class Counting(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(301, 700, bias=False)) for _ in range(2))
        for p in self.parameters():
            nn.init.zeros_(p)

    def training_step(self, batch: Any, index: int) -> Tensor:
        ones = torch.ones(1, 301)
        return -sum(layer(ones).sum() for layer in self.layers)  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=1.0, momentum=1e-9)  # with a state, in 8 bits

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(100_000, 301), batch_size=1)  # type: ignore[arg-type]


class SaveAlways(L.Callback):
    def __init__(self, path: Path, done: Path) -> None:
        self.path, self.done = path, done

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            beside = self.done.with_suffix(".new")
            beside.write_text(str(trainer.global_step))
            os.replace(beside, self.done)


def rank_main(rank: int, number: int, folder: Path) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="29400")
    join(rank, 2, folder / f"store {number}")
    path = folder / "last"
    strategy = ShardedStrategy(save_distributed_checkpoint=number % 3 > 0)
    there = any(path.with_name(name).exists() for name in ("last", "last.previous"))
    made = trainer(strategy, callbacks=[SaveAlways(path, folder / f"done {number}")])
    made.fit(Counting(), ckpt_path=path if there else None)


def check(path: Path, at_least: int) -> int:
    found = AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    step = found["global_step"]
    states = found["optimizer_states"][0]["state"].values()
    values = {float(x) for weight in found["state_dict"].values() for x in weight.unique()}
    counts = {float(entries["step"]) for entries in states}
    assert values == counts == {float(step)}, f"step {step}: weights {values}, counts {counts}"
    assert all("momentum_buffer_codes" in entries for entries in states), "no codes"
    assert step >= at_least, f"step {step}, but {at_least} had been saved"
    return step


def main(folder: Path, rounds: int) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dice, step = random.Random(0), 0
    for number in range(rounds):
        ranks: Any = mp.start_processes(rank_main, (number, folder), 2, join=False, start_method="fork")
        done, deadline = folder / f"done {number}", time.monotonic() + 60
        while not done.exists():
            assert time.monotonic() < deadline, "nothing was saved"
            assert all(p.is_alive() for p in ranks.processes), "a rank ended by itself"
            time.sleep(0.005)
        time.sleep(dice.random() * 0.5)
        victims = dice.choice([[0], [1], [0, 1]])
        for rank in victims:
            os.kill(ranks.processes[rank].pid, signal.SIGKILL)
        time.sleep(0.1)  # a survivor goes as far as it can
        for process in ranks.processes:
            process.kill()
            process.join()
        step = check(folder / "last", max(step, int(done.read_text())))
        print(
            f"round {number}: killed {victims}, step {step}", *sorted(p.name for p in folder.glob("last*")), flush=True
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
