"""``kill -9`` while a paged optimizer steps and checkpoints are saved: ``paged_kill.py FOLDER ROUNDS``, 0 where all is
right.

A child trains with its states in a page file, saving after each step to the same path, until it is killed at a random
moment. What loads then must be of one piece, not older than the last save that had returned, and to the bit what an
optimizer without pages has after as many steps; the page file must have left nothing. The next round resumes from it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from lowbit_lightning import optim

SHAPES = ((300, 700), (513, 256), (70,), (1024, 300))
PAGED: dict[str, Any] = {"paged": "disk", "resident": 0}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    """Step ``number``, the same whoever takes it."""
    generator = torch.Generator().manual_seed(number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def child(_: int, folder: Path, pages: Path, number: int) -> None:
    torch.set_num_threads(1)
    params = parameters()
    optimizer = optim.AdamW(params, lr=0.01, page_dir=str(pages), **PAGED)
    path, step = folder / "last.pt", 0
    if path.exists():
        step = load(path, params, optimizer)
    while True:
        train(params, optimizer, step)
        step += 1
        beside = folder / "new.pt"
        torch.save({"step": step, "params": list(params), "optimizer": optimizer.state_dict()}, beside)
        os.replace(beside, path)
        (folder / f"done {number}").write_text(str(step))
        assert os.listdir(pages) == [], "a page file with a name"


def load(path: Path, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    found = torch.load(path)
    with torch.no_grad():
        for p, saved in zip(params, found["params"], strict=True):
            p.copy_(saved)
    optimizer.load_state_dict(found["optimizer"])
    return found["step"]


class Reference:
    """The run without pages and without end, as far as it is asked for."""

    def __init__(self) -> None:
        self.params, self.step = parameters(), 0
        self.optimizer = optim.AdamW(self.params, lr=0.01)

    def at(self, step: int) -> list[Tensor]:
        while self.step < step:
            train(self.params, self.optimizer, self.step)
            self.step += 1
        return tensors(self.params, self.optimizer)


def tensors(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [*params, *(value for p in params for _, value in sorted(dict(optimizer.state[p]).items()))]


def main(folder: Path, pages: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    dice, step, reference = random.Random(0), 0, Reference()
    for number in range(rounds):
        running: Any = mp.start_processes(child, (folder, pages, number), 1, join=False, start_method="fork")
        process, done, deadline = running.processes[0], folder / f"done {number}", time.monotonic() + 60
        while not done.exists() or not done.read_text():
            assert time.monotonic() < deadline, "nothing was saved"
            assert process.is_alive(), "the child ended by itself"
            time.sleep(0.005)
        time.sleep(dice.random() * 0.5)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert os.listdir(pages) == [], f"left behind: {os.listdir(pages)}"
        params = parameters()
        optimizer = optim.AdamW(params, lr=0.01, page_dir=str(pages), **PAGED)
        at_least, step = max(step, int(done.read_text() or 0)), load(folder / "last.pt", params, optimizer)
        assert step >= at_least, f"step {step}, but {at_least} had been saved"
        for ours, theirs in zip(tensors(params, optimizer), reference.at(step), strict=True):
            assert ours.dtype == theirs.dtype, f"step {step}"
            assert torch.equal(ours, theirs), f"step {step}"
        print(f"round {number}: step {step}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
