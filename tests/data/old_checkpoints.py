"""Checkpoints that were written before the states got a store of their own, and the step that followed each of them.

``python tests/data/old_checkpoints.py write old_checkpoints`` made ``old_checkpoints/``, with the library of that time
on PYTHONPATH; ``check`` loads each checkpoint there and takes the same step again. Every gradient is a tensor that the
step's number seeds, so that no matrix product of the machine decides what a step computes.

* ``single.pt``: ``state_dict()`` of optimizers of every kind of state, on one device;
* ``sharded/``: a folder of ``ShardedStrategy`` on two ranks;
* ``deepspeed/``: one of ``DeepSpeedStrategy``, stage 2, on two ranks.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.ranks import fork, join

from lowbit_lightning import optim

SAVED = 2  # steps before a checkpoint
SHAPES = ((4, 320), (5, 70), (40,))  # rows of a whole and a short block; rows of less than a block; a vector
KINDS: dict[str, tuple[type[optim.LowBitOptimizer], dict[str, Any], torch.dtype]] = {
    "adamw": (optim.AdamW, {"amsgrad": True}, torch.float32),
    "block size": (optim.AdamW, {"block_size": 64}, torch.float32),
    "master": (optim.AdamW, {"master": "bf16+8"}, torch.bfloat16),
    "stochastic": (optim.Lion, {"stochastic_rounding": True}, torch.bfloat16),
    "32 bits": (optim.Adam, {"bits": 32}, torch.float32),
    "mixed": (optim.AdEMAMix, {}, torch.float32),
    "norms": (optim.LAMB, {}, torch.float32),
    "momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9}, torch.float32),
    "paged": (optim.RMSprop, {"paged": "disk", "centered": True, "momentum": 0.5}, torch.float32),
}
"""Optimizers of ``single.pt``."""

Picture = list[dict[str, Tensor]]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


class Model(L.LightningModule):
    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(99)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) for shape in SHAPES)
        self.optimizer = optimizer

    def training_step(self, *_: Any) -> Tensor:
        """Its gradients are those of the step."""
        pairs = zip(self.weights, gradients(self.trainer.global_step), strict=True)
        return torch.stack([(p * g).sum() for p, g in pairs]).sum()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=1e-2, min_size=300)

    def train_dataloader(self) -> Any:
        return DataLoader(range(SAVED + 1))  # type: ignore[arg-type]


class Save(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.path)


# -- what a step left ------------------------------------------------------------------------------------------------


def whole(x: Any) -> Tensor:
    x = torch.as_tensor(x).detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).cpu().clone()


def picture(params: Any, optimizer: Any) -> Picture:
    """The parameters as the optimizer knows them, and their states; a collective."""
    return [{"": whole(p), **{name: whole(x) for name, x in dict(optimizer.state[p]).items()}} for p in params]


def difference(found: Picture, expected: Picture) -> str | None:
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if x.keys() != y.keys():
            return f"parameter {i} has {sorted(x)}, not {sorted(y)}"
        for name in x:
            if x[name].dtype != y[name].dtype or not torch.equal(x[name], y[name]):
                return f"parameter {i}: {name or 'itself'} differs"
    return None


# -- one device ------------------------------------------------------------------------------------------------------


def made(kind: str) -> tuple[list[nn.Parameter], optim.LowBitOptimizer]:
    cls, options, dtype = KINDS[kind]
    params = [nn.Parameter(p.detach().to(dtype)) for p in Model().weights]
    return params, cls(params, **{"min_size": 300, **options})


def step(params: list[nn.Parameter], optimizer: optim.LowBitOptimizer, number: int) -> None:
    for p, gradient in zip(params, gradients(number), strict=True):
        p.grad = gradient.to(p.dtype)
    optimizer.step()


def write_single(folder: Path) -> None:
    saved = {}
    for kind in KINDS:
        params, optimizer = made(kind)
        for number in range(SAVED):
            step(params, optimizer, number)
        states, before = optimizer.state_dict(), [p.detach().clone() for p in params]
        states = {**states, "state": {k: {n: whole(x) for n, x in e.items()} for k, e in states["state"].items()}}
        step(params, optimizer, SAVED)
        saved[kind] = {"params": before, "optimizer": states, "after": picture(params, optimizer)}
    torch.save(saved, folder / "single.pt")


def check_single(folder: Path) -> str | None:
    saved = torch.load(folder / "single.pt")
    for kind in KINDS:
        params, optimizer = made(kind)
        for p, before in zip(params, saved[kind]["params"], strict=True):
            p.data.copy_(before)
        optimizer.load_state_dict(saved[kind]["optimizer"])
        step(params, optimizer, SAVED)
        problem = difference(picture(params, optimizer), saved[kind]["after"])
        if problem:
            return f"{kind}: {problem}"
    return None


# -- two ranks -------------------------------------------------------------------------------------------------------


def strategy(name: str) -> Any:
    from lowbit_lightning.strategies import DeepSpeedStrategy, ShardedStrategy

    return ShardedStrategy(save_distributed_checkpoint=True) if name == "sharded" else DeepSpeedStrategy(2)


def fit(name: str, callbacks: list[L.Callback], path: Path | None = None) -> Picture:
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "max_epochs": 1, "use_distributed_sampler": False}
    settings |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(strategy=strategy(name), callbacks=callbacks, **settings)
    trainer.fit(Model(optim.AdamW), ckpt_path=path)
    (optimizer,) = trainer.optimizers
    return picture([p for group in optimizer.param_groups for p in group["params"]], optimizer)


def rank_main(rank: int, action: str, name: str, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="29400")
    join(rank, 2, folder / f"{name}.store")
    path, after = folder / name, folder / f"{name}_{rank}.pt"
    if action == "write":
        torch.save(fit(name, [Save(path)]), after)
    else:
        problem = difference(fit(name, [], path), torch.load(after))
        (folder / f"{name}_{rank}.txt").write_text(problem or "")
    dist.destroy_process_group()


def run(action: str, name: str, folder: Path) -> None:
    fork(rank_main, (action, name, folder), 2)
    (folder / f"{name}.store").unlink()


def main(action: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    folder.mkdir(exist_ok=True)
    for name in ("sharded", "deepspeed"):  # first: from a process that has computed nothing yet
        run(action, name, folder)
    if action == "write":
        for script in (folder / "deepspeed").glob("*.py"):  # copies of DeepSpeed's tools
            script.unlink()
        write_single(folder)
    else:
        (folder / "single.txt").write_text(check_single(folder) or "")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
