"""What int8 costs vision models in quality: a ResNet-18, a ConvNeXt, a UNet and a vision transformer.

    python benchmarks/int8_vision_quality.py [--models resnet,unet] [--seeds 3] [--steps 200] [--output docs/benchmarks]

Models and images are those of ``examples/vision.py``: digits on photographs, to be named, or by the UNet to be found
pixel by pixel. Four ways to train are paired by seed: the same weights, the same batches, the same optimizer (torch's,
states in 32 bits), so that only the arithmetic differs:

- **fp32**;
- **fp32, nudged**: the same, from weights that differ in the sixth digit. Training amplifies the difference, so this
  shows how far two equal runs come apart by chance, which is what any other difference has to be compared with;
- **bf16-mixed**;
- **int8-mixed** with ``swap="all"``: every convolution in int8, also those that are slower, and tested in int8.

No image is trained on twice, so nothing is learnt by heart, and the losses of training and of held-out images can be
compared. ``--data digits`` trains on 1,437 plain digits again and again: there the held-out loss comes from a few wrong
answers that the model is sure of.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _common import ROOT, Report, parser
from torch import nn

from lowbit_lightning import Int8MixedPrecision, kernels

sys.path.insert(0, str(ROOT / "examples"))

from vision_data import Data, Images, Scenes
from vision_training import TASKS, Task, Vision, Way, train

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

NUDGED = "fp32, nudged"
WAYS: dict[str, Callable[[], Any]] = {
    "fp32": lambda: "32-true",
    NUDGED: lambda: "32-true",
    "bf16-mixed": lambda: "bf16-mixed",
    "int8-mixed": lambda: Int8MixedPrecision(swap="all"),
}
HOW = (
    "Differences are means of pairs of the same seed, with their standard errors. The training loss is that of the last"
    " third of training."
)


class Drawn:
    """Scenes, new ones in each step."""

    def __init__(self, task: Task, arguments: argparse.Namespace) -> None:
        self.task, self.count, self.held_out = task, arguments.steps * arguments.batch, arguments.held_out
        self.scenes = Scenes()

    def data(self, seed: int) -> Data:
        return self.scenes.data(self.task.segments, self.count, self.held_out, seed)


class Digits:
    """Plain digits, again and again; a batch is shifted by up to two pixels. Every fifth digit is held out."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.steps, self.batch = arguments.steps, arguments.batch
        scenes = Scenes()
        images = nn.functional.pad(2 * scenes.strokes[24] - 1, (4, 4, 4, 4), value=-1.0)[:, None].expand(-1, 3, -1, -1)
        held_out = torch.arange(len(images)) % 5 == 0
        self.known = Images(images[~held_out], scenes.written[~held_out])
        self.held_out = Images(images[held_out], scenes.written[held_out])

    def data(self, seed: int) -> Data:
        chance = torch.Generator().manual_seed(seed)
        count = self.steps * self.batch
        orders = [torch.randperm(len(self.known), generator=chance) for _ in range(count // len(self.known) + 1)]
        chosen = torch.cat(orders)[:count]
        shifts = torch.randint(-2, 3, (self.steps, 2), generator=chance).tolist()
        batches = self.known.images[chosen].split(self.batch)
        shifted = [images.roll(shift, (2, 3)) for images, shift in zip(batches, shifts, strict=True)]
        return Data(Images(torch.cat(shifted), self.known.targets[chosen]), self.held_out, Scenes.classes)


def run(task: Task, way: str, data: Data, batch: int, seed: int) -> Vision:
    L.seed_everything(seed, verbose=False)
    model = task.small(len(data.classes), 32)
    if way == NUDGED:
        chance = torch.Generator().manual_seed(-seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=chance))
    kernels.reset_calls()
    module = train(task, Way(WAYS[way]()), model, data, batch)
    if (way == "int8-mixed") != bool(kernels.calls()):
        raise RuntimeError(f"{way}: the products that ran in int8 are {kernels.calls()}")
    return module


@dataclass(frozen=True)
class Measure:
    """Of a finished run. Differences are in its own unit, or ``relative`` ones in percent; ``allowed``: the most by
    which int8 may be worse."""

    value: Callable[[Vision], float]
    digits: int
    relative: bool
    allowed: float

    def differences(self, runs: list[Vision], base: list[Vision]) -> list[float]:
        pairs = [(self.value(a), self.value(b)) for a, b in zip(runs, base, strict=True)]
        return [100 * (a / b - 1) if self.relative else a - b for a, b in pairs]

    def worse(self, runs: list[Vision], base: list[Vision]) -> float:
        """By how much, in the mean of the pairs."""
        change = statistics.mean(self.differences(runs, base))
        return change if self.relative else -change

    def cells(self, runs: list[Vision], base: list[Vision]) -> list[str]:
        mean = f"{statistics.mean(map(self.value, runs)):.{self.digits}f}"
        if runs is base:
            return [mean, ""]
        values = self.differences(runs, base)
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return [mean, f"{statistics.mean(values):+.2f} ± {error:.2f}" + " %" * self.relative]


MEASURES = {
    "right, %": Measure(lambda m: m.score.quality, 2, relative=False, allowed=1.0),
    "held-out loss": Measure(lambda m: m.score.loss, 4, relative=True, allowed=2.0),
    "training loss": Measure(lambda m: m.train_loss, 4, relative=True, allowed=2.0),
}


def verdict(model: str, runs: dict[str, list[Vision]]) -> list[str]:
    """What int8 makes worse than it may."""
    found = []
    for name, measure in MEASURES.items():
        worse = measure.worse(runs["int8-mixed"], runs["fp32"])
        if worse > measure.allowed:
            found.append(f"{model}: {name} is worse by {worse:.2f} in int8-mixed; {measure.allowed} is allowed")
    return found


def draw(path: Path, runs: dict[str, dict[str, list[Vision]]]) -> None:
    """The training loss, the mean of the seeds, smoothed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(runs), 3.2), layout="constrained")
    for axis, (model, ways) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        for way, own in ways.items():
            losses = torch.stack([torch.stack(m.losses) for m in own]).mean(0)
            window = min(15, len(losses))
            smooth = losses.unfold(0, window, 1).mean(1).tolist()
            axis.plot(range(window, len(losses) + 1), smooth, label=way, linewidth=2 if way == "fp32" else 1.2)
        axis.set(title=model, xlabel="step", yscale="log")
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend()
    figure.savefig(path, dpi=90)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--models", default="resnet,convnext,unet,vit")
    options.add_argument("--data", choices=("scenes", "digits"), default="scenes")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=200, help="with --data digits, 22 steps are an epoch")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--held-out", type=int, default=2000, help="scenes to test on")
    arguments = options.parse_args()
    of_digits = arguments.data == "digits"
    report = Report("int8 vision quality" + " digits" * of_digits, arguments)
    report.add(f"{arguments.steps} steps of {arguments.batch} images of 32 x 32, {arguments.seeds} seeds. {HOW}", "")
    found: dict[str, dict[str, list[Vision]]] = {}
    failures = []
    for name in arguments.models.split(","):
        source = Digits(arguments) if of_digits else Drawn(TASKS[name], arguments)
        runs: dict[str, list[Vision]] = {way: [] for way in WAYS}
        for seed in range(1, arguments.seeds + 1):
            data = source.data(seed)
            for way, own in runs.items():
                own.append(run(TASKS[name], way, data, arguments.batch, seed))
                print(f"{name}, seed {seed}, {way}: {own[-1].score}, training {own[-1].train_loss:.4f}", flush=True)
        report.add(f"## {name}" + ", mean IoU" * TASKS[name].segments, "")
        rows = [[way, *(c for m in MEASURES.values() for c in m.cells(own, runs["fp32"]))] for way, own in runs.items()]
        report.table(["", *(title for name in MEASURES for title in (name, "from fp32"))], rows)
        failures += verdict(name, runs)
        found[name] = runs
    report.add(*[f"- {failure}" for failure in failures] or ["All is within the bounds."])
    if arguments.output:
        stem = f"{datetime.date.today()}-{report.name}-{arguments.device}"
        arguments.output.mkdir(parents=True, exist_ok=True)
        draw(arguments.output / f"{stem}.png", found)
        report.add("", f"![training losses]({stem}.png)")
    report.save()
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
