"""What int8 costs vision models in quality: a ResNet-18, a ConvNeXt, a UNet and a vision transformer.

    python benchmarks/int8_vision_quality.py [--models resnet,unet] [--seeds 1,2,3] [--output docs/benchmarks]

Models, images and settings are those of ``examples/vision.py``: digits on photographs, to be named, or by the UNet to
be found pixel by pixel. Four ways to train are paired by seed: the same weights (of the ResNet those of a first
training in fp32), the same batches, the same optimizer (torch's, states in 32 bits), so that only the arithmetic
differs:

- **fp32**;
- **fp32, nudged**: the same, from weights that differ in the fifth digit. Training amplifies the difference, so this
  shows how far two equal runs come apart by chance, which is what any other difference has to be compared with;
- **bf16-mixed**;
- **int8-mixed** with ``swap="all"``: every convolution in int8, also those that are slower, and tested in int8.

What is tested is the mean of the weights over the last third of training, in every way alike. It has less noise than
the last weights, which a batch more or less would change.

No image is trained on twice, so nothing is learnt by heart, and the losses of training and of held-out images can be
compared. ``--data digits`` trains on 1,437 plain digits again and again: there the held-out loss comes from a few wrong
answers that the model is sure of.

Each finished training is a file in ``--results``, and is not repeated. So ``--models resnet --seeds 2`` does one piece,
and a last call with all models and seeds has only the report to write.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import logging
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _common import ROOT, Report, parser
from torch import Tensor, nn

from lowbit_lightning import Int8MixedPrecision, kernels

sys.path.insert(0, str(ROOT / "examples"))

from vision_data import Data, Images, Scenes
from vision_training import TASKS, Task, Way, begun, train

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
    " third of training; tested is the mean of the weights over it."
)


class Drawn:
    """Scenes, new ones in each step."""

    def __init__(self, task: Task, steps: int, arguments: argparse.Namespace) -> None:
        self.task, self.steps, self.batch, self.held_out = task, steps, arguments.batch, arguments.held_out
        self.scenes = Scenes()

    def data(self, seed: int) -> Data:
        return self.scenes.data(self.task.segments, self.steps * self.batch, self.held_out, seed)

    def begun(self, model: nn.Module, seed: int) -> nn.Module:
        return begun(self.task, model, self.scenes, self.batch, seed)


class Digits:
    """Plain digits, again and again; a batch is shifted by up to two pixels. Every fifth digit is held out."""

    def __init__(self, steps: int, arguments: argparse.Namespace) -> None:
        self.steps, self.batch = steps, arguments.batch
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

    def begun(self, model: nn.Module, seed: int) -> nn.Module:
        return model


@dataclass(frozen=True)
class Run:
    """A finished training: accuracy or mean IoU in percent, losses, and the training loss of each step."""

    quality: float
    loss: float
    train_loss: float
    losses: list[float]


class Averaged(L.Callback):
    """Leaves the mean of the weights, and of the statistics of batch norms, over the last third of training."""

    def __init__(self, steps: int) -> None:
        self.first, self.count = steps - max(1, steps // 3), 0
        self.means: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step <= self.first:
            return
        self.count += 1
        values = self._values(module)
        if self.count == 1:
            self.means = [x.clone() for x in values]
        for mean, x in zip(self.means, values, strict=True):
            mean.lerp_(x, 1 / self.count)

    def on_train_end(self, _: L.Trainer, module: L.LightningModule) -> None:
        for x, mean in zip(self._values(module), self.means, strict=True):
            x.copy_(mean)

    def _values(self, module: nn.Module) -> list[Tensor]:
        return [x for x in module.state_dict().values() if x.is_floating_point()]


def run(task: Task, way: str, model: nn.Module, data: Data, batch: int, seed: int) -> Run:
    L.seed_everything(seed, verbose=False)
    if way == NUDGED:
        chance = torch.Generator().manual_seed(-seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-5 * torch.randn(p.shape, generator=chance))
    kernels.reset_calls()
    module = train(task, Way(WAYS[way]()), model, data, batch, Averaged(len(data.training) // batch))
    if (way == "int8-mixed") != bool(kernels.calls()):
        raise RuntimeError(f"{way}: the products that ran in int8 are {kernels.calls()}")
    return Run(module.score.quality, module.score.loss, module.train_loss, torch.stack(module.losses).tolist())


def runs_of(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Run]:
    """All ways of a model and a seed; those that are not in the results yet are trained.

    Raises:
        SystemExit: if the results there are of other settings.
    """
    task = TASKS[name]
    steps = arguments.steps or task.steps
    asked = {"steps": steps, **{key: getattr(arguments, key) for key in ("data", "batch", "held_out")}}
    path = arguments.results / f"{name}-{seed}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"settings": asked, "runs": {}}
    if kept["settings"] != asked:
        raise SystemExit(f"{path} is of {kept['settings']}, not {asked}: choose another --results")
    missing = [way for way in WAYS if way not in kept["runs"]]
    if missing:
        source = Digits(steps, arguments) if arguments.data == "digits" else Drawn(task, steps, arguments)
        data = source.data(seed)
        L.seed_everything(seed, verbose=False)
        start = source.begun(task.small(len(data.classes), 32), seed)
    for way in missing:
        found = run(task, way, copy.deepcopy(start), data, arguments.batch, seed)
        print(f"{name}, seed {seed}, {way}: {found.quality:.2f} % right, loss {found.loss:.4f}", flush=True)
        kept["runs"][way] = asdict(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept))
    return {way: Run(**kept["runs"][way]) for way in WAYS}


@dataclass(frozen=True)
class Measure:
    """A field of ``Run``. Differences are in its own unit, or ``relative`` ones in percent; ``allowed``: the most by
    which int8 may be worse."""

    field: str
    digits: int
    relative: bool
    allowed: float

    def values(self, runs: list[Run]) -> list[float]:
        return [getattr(run, self.field) for run in runs]

    def differences(self, runs: list[Run], base: list[Run]) -> list[float]:
        pairs = zip(self.values(runs), self.values(base), strict=True)
        return [100 * (a / b - 1) if self.relative else a - b for a, b in pairs]

    def worse(self, runs: list[Run], base: list[Run]) -> float:
        """By how much, in the mean of the pairs."""
        change = statistics.mean(self.differences(runs, base))
        return change if self.relative else -change

    def cells(self, runs: list[Run], base: list[Run]) -> list[str]:
        mean = f"{statistics.mean(self.values(runs)):.{self.digits}f}"
        if runs is base:
            return [mean, ""]
        values = self.differences(runs, base)
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return [mean, f"{statistics.mean(values):+.2f} ± {error:.2f}" + " %" * self.relative]


MEASURES = {
    "right, %": Measure("quality", 2, relative=False, allowed=1.0),
    "held-out loss": Measure("loss", 4, relative=True, allowed=2.0),
    "training loss": Measure("train_loss", 4, relative=True, allowed=2.0),
}


def verdict(model: str, runs: dict[str, list[Run]]) -> list[str]:
    """What int8 makes worse than it may."""
    found = []
    for name, measure in MEASURES.items():
        worse = measure.worse(runs["int8-mixed"], runs["fp32"])
        if worse > measure.allowed:
            found.append(f"{model}: {name} is worse by {worse:.2f} in int8-mixed; {measure.allowed} is allowed")
    return found


def draw(path: Path, runs: dict[str, dict[str, list[Run]]]) -> None:
    """The training loss, the mean of the seeds, smoothed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(runs), 3.2), layout="constrained")
    for axis, (model, ways) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        for way, own in ways.items():
            losses = torch.tensor([run.losses for run in own]).mean(0)
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
    options.add_argument("--seeds", default="1,2,3")
    options.add_argument("--steps", type=int, help="default: the example's; with --data digits, 22 steps are an epoch")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--results", type=Path, default=Path("runs/int8_vision_quality"), help="of single trainings")
    options.add_argument("--held-out", type=int, default=2000, help="scenes to test on")
    arguments = options.parse_args()
    of_digits = arguments.data == "digits"
    report = Report("int8 vision quality" + " digits" * of_digits, arguments)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    report.add(f"Steps of {arguments.batch} images of 32 x 32, {len(seeds)} seeds. {HOW}", "")
    found: dict[str, dict[str, list[Run]]] = {}
    failures = []
    for name in arguments.models.split(","):
        by_seed = [runs_of(name, seed, arguments) for seed in seeds]
        runs = {way: [one[way] for one in by_seed] for way in WAYS}
        task = TASKS[name]
        before = f", after {task.before} in fp32" if task.before and not of_digits else ""
        steps = f"{arguments.steps or task.steps} steps{before}"
        report.add(f"## {name}: {steps}" + ", mean IoU" * task.segments, "")
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
