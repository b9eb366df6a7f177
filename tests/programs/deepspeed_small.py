"""More checks for ``deepspeed_ranks.py``: of a small model, against DDP and Lightning's own strategy.

What DeepSpeed does with a gradient is seen with plain SGD: AdamW's steps are the same for half of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning.strategies import DeepSpeedStrategy

STEPS, BATCH, STAGES = 6, 6, (1, 2, 3)
SGD: Any = partial(torch.optim.SGD, lr=0.5)
AdamW: Any = partial(torch.optim.AdamW, lr=1e-2)


class Small(L.LightningModule):
    """An embedding, three matrices, vectors; the same batches in the same order on any number of ranks."""

    def __init__(self, optimizer: Any = AdamW, schedule: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(64, 128), nn.Linear(128, 256), nn.Linear(256, 128)
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 64)
        self.optimizer, self.schedule, self.losses = optimizer, schedule, list[Tensor]()
        self.inputs = torch.randint(0, 64, (BATCH * STEPS, 8), generator=torch.Generator().manual_seed(1))

    def loss(self, index: int) -> Tensor:
        x = self.inputs[index * BATCH + dist.get_rank() : (index + 1) * BATCH : dist.get_world_size()]
        logits = self.head(self.norm(self.down(torch.relu(self.up(self.embed(x))))))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ((x + 7) % 64).flatten())

    def training_step(self, _: Tensor, index: int) -> Tensor:
        loss = self.loss(index)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, _: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(index), sync_dist=True)

    def train_dataloader(self) -> Any:
        return DataLoader(range(STEPS))  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(range(2))  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}

    def mean_losses(self) -> list[float]:
        """Of all ranks; a collective."""
        losses = torch.stack(self.losses)
        dist.all_reduce(losses)
        return (losses / dist.get_world_size()).tolist()


class ByHand(Small):
    """Manual optimization: a step for each two batches."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.automatic_optimization = False

    def training_step(self, _: Tensor, index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(_, index) / 2)
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()


def trainer_of(strategy: Any, **options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fixed = {"accelerator": "cpu", "max_epochs": 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    return L.Trainer(devices=dist.get_world_size(), strategy=strategy, **{**quiet, **fixed, **options})


def fit(strategy: Any, model: Any = None, ckpt_path: Any = None, **options: Any) -> tuple[Any, L.Trainer]:
    model, trainer = model or Small(), trainer_of(strategy, **options)
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer


def off(found: list[float], expected: list[float], limit: float) -> str | None:
    worst = max(abs(x - y) / abs(y) for x, y in zip(found, expected, strict=True))
    return None if worst <= limit else f"losses are off by {worst:.1e}: {found}, {expected}"


def raised(action: Callable[[], Any], kind: type[BaseException] = ValueError) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return f"no {kind.__name__}"


# -- checks: folder -> what is wrong, or None --------------------------------------------------------------------------


def gradients_are_those_of_ddp(folder: Path) -> str | None:
    """Accumulated, clipped, in int8, and by hand."""
    kinds: list[tuple[dict[str, Any], tuple[int, ...], float]] = [
        ({"accumulate_grad_batches": 3}, (1, 2), 1e-6),
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, (2, 3), 1e-6),
        ({"accumulate_grad_batches": 3, "precision": "int8-mixed"}, (2,), 1e-3),
    ]
    for options, stages, limit in kinds:
        expected = fit("ddp", Small(SGD), **options)[0].mean_losses()
        for stage in stages:
            found = fit(DeepSpeedStrategy(stage, optimizer_bits=32), Small(SGD), **options)[0].mean_losses()
            problem = off(found, expected, limit)
            if problem:
                return f"stage {stage}, {options}: {problem}"
    expected = fit("ddp", ByHand())[0].mean_losses()
    problem = off(fit(DeepSpeedStrategy(3, optimizer_bits=32), ByHand())[0].mean_losses(), expected, 1e-6)
    message = raised(partial(fit, DeepSpeedStrategy(2), ByHand()), RuntimeError)
    return problem or (None if "do not add such gradients up" in message else message)


CHECKS: dict[str, tuple[Callable[[Path], str | None], ...]] = {
    "2": (gradients_are_those_of_ddp,),
    "1": (),
    "3": (),
}
