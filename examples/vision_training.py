"""How ``vision.py`` trains a model in one precision, tests it, and uses it in low bits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from vision_data import Batch, Data, Folder, Scenes
from vision_models import ConvNeXt, ResNet, UNet, VisionTransformer

import lowbit_lightning
from lowbit_lightning import convert, memory, optim

IGNORED = 3  # steps before the clock starts: kernels are compiled there, and convolutions are timed


@dataclass(frozen=True)
class Task:
    """A model and how it is trained. ``small`` and ``full`` make it for a number of classes and a size of images;
    ``steps`` are enough for the small one to be sure of most held-out scenes.

    Learning rates are such that two trainings in fp32 from almost the same weights end alike. For the ResNet none does
    that which teaches it anything, so all its trainings go on from the same model, after ``before`` steps in fp32 at
    ``before_lr``.
    """

    small: Callable[[int, int], nn.Module]
    full: Callable[[int, int], nn.Module]
    optimizer: str
    options: dict[str, float]
    steps: int
    segments: bool = False
    before: int = 0
    before_lr: float = 0.0


TASKS = {
    "vit": Task(
        lambda classes, size: VisionTransformer(classes, size),
        lambda classes, size: VisionTransformer(classes, size, patch=16, width=384, layers=12),
        "AdamW",
        {"lr": 2e-3, "weight_decay": 0.05},
        300,
    ),
    "resnet": Task(
        lambda classes, size: ResNet(classes, width=16, small=True),
        lambda classes, size: ResNet(classes),
        "AdamW",
        {"lr": 3e-4, "weight_decay": 0.05},
        200,
        before=200,
        before_lr=1e-3,
    ),
    "convnext": Task(
        lambda classes, size: ConvNeXt(classes),
        lambda classes, size: ConvNeXt(classes, width=96, depths=(3, 3, 9, 3), patch=4),
        "AdamW",
        {"lr": 6e-3, "weight_decay": 0.05},
        300,
    ),
    "unet": Task(
        lambda classes, size: UNet(classes),
        lambda classes, size: UNet(classes, width=64, levels=5),
        "AdamW",
        {"lr": 1e-3, "weight_decay": 1e-4},
        600,
        segments=True,
    ),
}


class Vision(L.LightningModule):
    """Any model whose logits have the classes in dimension 1. Targets are a class for each image or for each pixel.

    Args:
        optimizer: makes one of the parameters. steps: of the whole training, for the schedule.
    """

    def __init__(self, model: nn.Module, optimizer: Callable[..., Any], steps: int, classes: int) -> None:
        super().__init__()
        self.model, self.optimizer, self.steps, self.classes = model, optimizer, steps, classes
        self.losses: list[Tensor] = []
        self.started = self.stopped = 0.0
        self.score = Score(classes)
        self.report: Any = None  # int8-mixed: which layers run in int8, and why others do not

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.contiguous(memory_format=torch.channels_last))
        return logits.float()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if index == IGNORED:
            self.started = clock(self.device)
        images, targets = batch
        loss = F.cross_entropy(self(images), targets)
        self.losses.append(loss.detach())
        return loss

    def on_train_end(self) -> None:
        self.stopped = clock(self.device)

    def test_step(self, batch: Batch, index: int) -> None:
        self.score.add(self(batch[0]), batch[1])

    @property
    def train_loss(self) -> float:
        """The mean of the last third of training."""
        return torch.stack(self.losses[-max(1, self.steps // 3) :]).mean().item()

    @property
    def steps_per_second(self) -> float:
        return (self.steps - IGNORED) / (self.stopped - self.started)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def factor(self, step: int) -> float:
        """Of the learning rate: a linear warm-up, then linearly down to zero."""
        return min((step + 1) / max(1, self.steps // 10), 1 - step / self.steps)


class Score:
    """What a model says of held-out images, batch by batch."""

    def __init__(self, classes: int) -> None:
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)  # [truth, prediction]
        self.losses: list[Tensor] = []
        self.predicted: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor) -> None:
        predicted = logits.argmax(1)
        pairs = (targets * len(self.confusion) + predicted).flatten().cpu()
        self.confusion += pairs.bincount(minlength=self.confusion.numel()).view_as(self.confusion)
        each = F.cross_entropy(logits, targets, reduction="none")
        self.losses.append(each.flatten(1).mean(1).cpu() if each.ndim > 1 else each.cpu())
        self.predicted.append(predicted.cpu())

    def __str__(self) -> str:
        return f"{self.quality:.1f} % right, loss {self.loss:.4f}"

    @property
    def loss(self) -> float:
        return torch.cat(self.losses).mean().item()

    @property
    def predictions(self) -> Tensor:
        """int64 [images] or [images, height, width]."""
        return torch.cat(self.predicted)

    @property
    def quality(self) -> float:
        """In percent: the accuracy, or the mean IoU of the classes if there is a target for each pixel."""
        right = self.confusion.diag().double()
        if self.predicted[0].ndim == 1:
            return 100 * (right.sum() / self.confusion.sum()).item()
        union = self.confusion.sum(0) + self.confusion.sum(1) - right
        return 100 * (right / union)[union > 0].mean().item()


@dataclass
class Result:
    """Of one way to train or to use a model. For each seed: quality and loss on held-out images, the mean loss of the
    last third of training, images per second. ``bytes``: by kind, as planned for training, as held for inference."""

    quality: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def add(self, score: Score, speed: float, train_loss: float | None = None) -> None:
        self.quality.append(score.quality)
        self.loss.append(score.loss)
        self.speed.append(speed)
        if train_loss is not None:
            self.train_loss.append(train_loss)


def clock(device: torch.device) -> float:
    """Seconds: on a GPU, of the clock; on a CPU, which other programs may share, of the processor for each thread."""
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def optimizer_of(task: Task, bits: int | None) -> Callable[..., Any]:
    """torch's, or with ``bits`` this package's."""
    return partial(getattr(torch.optim if bits is None else optim, task.optimizer), **task.options)


@dataclass(frozen=True)
class Way:
    """How to train: a precision for the Trainer, and the bits of the optimizer's states (None: torch's optimizer)."""

    precision: Any = "32-true"
    bits: int | None = None


def train(task: Task, way: Way, model: nn.Module, data: Data, batch: int, *callbacks: L.Callback) -> Vision:
    """Trains the model in place, and tests it in the same precision."""
    batches = data.training.batches(batch)
    module = Vision(model, optimizer_of(task, way.bits), len(batches), len(data.classes))
    plugins: dict[str, Any] = {"precision": way.precision}
    trainer = L.Trainer(
        **plugins if isinstance(way.precision, str) else {"plugins": [way.precision]},
        max_steps=len(batches),
        callbacks=[*callbacks],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, _loader(batches))
    module.report = getattr(trainer.precision_plugin, "report", None)
    trainer.test(module, _loader(data.held_out.batches(64)), verbose=False)
    return module


def begun(task: Task, model: nn.Module, source: Scenes | Folder, batch: int, seed: int) -> nn.Module:
    """The model where the trainings begin that are compared: as it is, or after ``task.before`` steps in fp32."""
    if task.before:
        data = source.data(task.segments, task.before * batch, 1, 1000 + seed)
        train(replace(task, options={**task.options, "lr": task.before_lr}), Way(), model, data, batch)
    return model


def _loader(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@torch.no_grad()
def use(model: nn.Module, data: Data) -> tuple[Score, float]:
    """Tests a model as it is, outside the Trainer; also returns images per second."""
    model.eval()
    device = next(model.parameters()).device
    score, start = Score(len(data.classes)), clock(device)
    for images, targets in data.held_out.batches(64):
        logits = model(images.to(device, memory_format=torch.channels_last))
        score.add(logits.float(), targets.to(device))
    return score, len(data.held_out) / (clock(device) - start)


def in_low_bits(model: nn.Module, weights: str) -> nn.Module | None:
    """A copy whose linear layers have weights of that format; or with "int8 products", whose layers compute in int8.
    None if no layer fits."""
    low = copy.deepcopy(model)
    try:
        if weights == "int8 products":
            convert.swap_linears(low)
        else:
            lowbit_lightning.quantize(low, weights)
    except (convert.NothingToQuantize, convert.NothingToSwap):
        return None
    return low


def held(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers, in low bits or not."""
    report = convert.weight_report(model)
    return report.bytes_after + report.rest


def planned(task: Task, way: Way, model: nn.Module, batch: Batch) -> dict[str, int]:
    """Bytes of a training run by kind, before anything is allocated."""

    def step(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    momentum: dict[str, Any] = {"momentum": task.options["momentum"]} if "momentum" in task.options else {}
    name = way.precision if isinstance(way.precision, str) else "int8-mixed"
    plan = memory.plan(
        model, precision=name, optimizer=task.optimizer, bits=way.bits, batch=batch, step=step, **momentum
    )
    return {kind: getattr(plan, kind) or 0 for kind in ("parameters", "gradients", "states", "activations")}
