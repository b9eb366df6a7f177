"""What int8 convolutions cost in quality: a ResNet-18 on scikit-learn's digits at 32 x 32, fp32 and "int8-mixed".

    python benchmarks/int8_vision_quality.py [--seeds 3] [--epochs 6] [--width 32] [--output docs/benchmarks]

Seeds are paired: both precisions get the same weights, batches and shifts of images. Images are shifted by up to two
pixels, so that there is something to learn for longer. ``swap="all"``: every convolution runs in int8, also those that
are slower. The loss and the accuracy are those of 360 images that were not trained on, averaged over the last third of
the epochs.
"""

from __future__ import annotations

import logging
import statistics
from typing import Any

import lightning as L
import torch
from _common import Report, parser
from _resnet import ResNet
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import Int8MixedPrecision, kernels

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def digits() -> tuple[TensorDataset, TensorDataset]:
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(y)[order]
    return TensorDataset(images[360:], labels[360:]), TensorDataset(images[:360], labels[:360])


class Digits(L.LightningModule):
    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        model = ResNet(10, 1, width, small=True)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.steps = steps
        self.found: list[tuple[float, float]] = []
        self.sums = [0.0, 0.0, 0.0]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        down, across = torch.randint(-2, 3, (2,)).tolist()
        return nn.functional.cross_entropy(self.model(x.roll((down, across), (2, 3))), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        logits = self.model(x).float()
        right = (logits.argmax(1) == y).sum().item()
        for i, value in enumerate((nn.functional.cross_entropy(logits, y, reduction="sum").item(), right, len(y))):
            self.sums[i] += value

    def on_validation_epoch_end(self) -> None:
        loss, right, count = self.sums
        self.found.append((loss / count, right / count))
        self.sums = [0.0, 0.0, 0.0]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train(seed: int, int8: bool, epochs: int, width: int) -> tuple[float, float]:
    """Loss and accuracy."""
    L.seed_everything(seed, verbose=False)
    training, held_out = digits()
    loader = DataLoader(training, 64, shuffle=True, drop_last=True)
    model = Digits(width, epochs * len(loader))
    precision: dict[str, Any] = {"plugins": [Int8MixedPrecision(swap="all")]} if int8 else {"precision": "32-true"}
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **precision,
    )  # fmt: skip
    kernels.reset_calls()
    trainer.fit(model, loader, DataLoader(held_out, 120))
    if int8 and not kernels.calls():
        raise RuntimeError("nothing ran in int8")
    last = model.found[-max(1, epochs // 3) :]
    return statistics.mean(loss for loss, _ in last), statistics.mean(accuracy for _, accuracy in last)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--width", type=int, default=32)
    arguments = options.parse_args()
    report = Report("int8 vision quality", arguments)
    report.add(f"A ResNet-18 of width {arguments.width}, {arguments.epochs} epochs of 1437 digits at 32 x 32.", "")
    pairs = []
    for seed in range(arguments.seeds):
        pair = [train(seed, int8, arguments.epochs, arguments.width) for int8 in (False, True)]
        print(seed, pair, flush=True)
        pairs.append(pair)
    rows = [
        [str(seed), *(f"{value:.4f}" for run in pair for value in run), f"{100 * (pair[1][0] / pair[0][0] - 1):+.1f} %"]
        for seed, pair in enumerate(pairs)
    ]
    report.table(["seed", "fp32 loss", "accuracy", "int8 loss", "accuracy", "loss"], rows)
    loss, accuracy = ([statistics.mean(pair[i][k] for pair in pairs) for i in range(2)] for k in range(2))
    report.add(
        f"Means: loss {loss[0]:.4f} in fp32, {loss[1]:.4f} in int8 ({100 * (loss[1] / loss[0] - 1):+.1f} %); accuracy "
        f"{100 * accuracy[0]:.2f} % and {100 * accuracy[1]:.2f} %.",
        "",
    )
    report.save()


if __name__ == "__main__":
    main()
