"""Trains vision models on real images in fp32, with 8-bit optimizer states, and in int8; then uses them in low bits.

    python examples/vision.py                                                # under ten minutes on two cores
    python examples/vision.py --models vit --seeds 1 --steps 40              # a look
    python examples/vision.py --images FOLDER --size 224 --full --steps 5000   # one folder of images for each class

Offline, the images are scikit-learn's handwritten digits on patches of its photographs: new ones in each step, and the
truth of every pixel is known (``vision_data.Scenes``). A vision transformer (``vit``), a ResNet-18 (``resnet``) and a
ConvNeXt (``convnext``) name the digit. A UNet (``unet``) names the digit of each pixel, of two digits or none.

Every seed trains three times, from the same weights (the ResNet from those of a first training in fp32) on the same
images:

- **fp32** with torch's AdamW;
- **8-bit optimizer**: the same with ``lowbit_lightning.optim``;
- **int8-mixed**, which has the 8-bit optimizer too: two lines differ from fp32. All convolutions run in int8 here;
  ``precision="int8-mixed"`` alone leaves those that are slower in int8 (``--swap faster``), in small models most.

Each is tested on held-out images in the precision that it was trained in. The fp32 result is then used in low bits,
without further training: with "int8 products" the layers compute in int8 and keep their weights in fp32; in the other
rows the linear layers have weights of that format (convolutions have no such form). Results land in ``--output``:
vision.md, results.json and pictures of predictions. The exit status is 1 if int8-mixed is, in the mean of the seeds,
more than one point of accuracy (mean IoU) below fp32.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import running
import torch
from torch import Tensor, nn
from vision_data import SMALLEST, Data, Folder, Scenes
from vision_pictures import draw_classes, draw_masks
from vision_training import IGNORED, TASKS, Result, Way, begun, held, in_low_bits, planned, train, use

from lowbit_lightning import Int8MixedPrecision

WAYS = ("fp32", "8-bit optimizer", "int8-mixed")
LOW_BITS = ("int8 products", "int8", "nf4", "int3", "int2")
SWAP_HELP = "int8-mixed for all convolutions, or as the string does it: for those that are faster in int8 here"
ALLOWED = 1.0  # points below fp32
STEPS = ", ".join(f"{task.steps} for {name}" for name, task in TASKS.items())

Results = dict[str, dict[str, Result]]
"""Model -> way -> result."""


def way_of(name: str, swap: Any) -> Way:
    """A new one for each training: a plugin remembers the model that it served."""
    return Way(Int8MixedPrecision(swap=swap), 8) if name == "int8-mixed" else Way(bits=8 if "8-bit" in name else None)


def train_in(
    args: argparse.Namespace, name: str, source: Scenes | Folder, data: Data, seed: int, results: dict[str, Result]
) -> dict[str, tuple[nn.Module, Tensor]]:
    """Train in each way; returns the models, and what they predict of the held-out images."""
    found = {}
    task = TASKS[name]
    L.seed_everything(seed, verbose=False)
    new = (task.full if args.full else task.small)(len(data.classes), args.size)
    start = begun(task, new, source, args.batch, seed)
    for way in WAYS:
        settings, model = way_of(way, args.swap), copy.deepcopy(start)
        if not results[way].bytes:
            results[way].bytes = planned(task, settings, model, data.training.batches(args.batch)[0])
        module = train(task, settings, model, data, args.batch)
        results[way].add(module.score, module.steps_per_second * args.batch, module.train_loss)
        if seed == 1 and module.report:
            print(module.report)
        print(f"{name}, seed {seed}, {way}: {module.score}", flush=True)
        found[way] = model, module.score.predictions
    return found


def use_all(plain: nn.Module, data: Data, results: dict[str, Result]) -> None:
    """Test the model of fp32 in every low-bit form that it can have."""
    for way in ("fp32", *LOW_BITS):
        low = plain if way == "fp32" else in_low_bits(plain, way)
        if low is not None:
            results.setdefault(way, Result(bytes={"weights": held(low)})).add(*use(low, data))


def run(args: argparse.Namespace, source: Scenes | Folder) -> tuple[Results, Results, dict[str, dict[str, Tensor]]]:
    """How each model trained, how it can be used, and what those of the first seed predict, by way."""
    trained: Results = {name: {way: Result() for way in WAYS} for name in args.models}
    used: Results = {name: {} for name in args.models}
    predictions: dict[str, dict[str, Tensor]] = {name: {} for name in args.models}
    for name in args.models:
        for seed in range(1, args.seeds + 1):
            steps = args.steps or TASKS[name].steps
            data = source.data(TASKS[name].segments, steps * args.batch, args.held_out, seed)
            found = train_in(args, name, source, data, seed, trained[name])
            use_all(found["fp32"][0], data, used[name])
            if seed == 1:
                predictions[name] = {way: predicted for way, (_, predicted) in found.items()}
    return trained, used, predictions


# -- what it says ----------------------------------------------------------------------------------------------------


def difference(result: Result, base: Result) -> tuple[float, float]:
    """Mean of the paired differences of quality in points, and its standard error."""
    return _mean_and_error([a - b for a, b in zip(result.quality, base.quality, strict=True)])


def loss_change(result: Result, base: Result) -> tuple[float, float]:
    """The same of the held-out loss, in percent of the base's."""
    return _mean_and_error([100 * (a / b - 1) for a, b in zip(result.loss, base.loss, strict=True)])


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def table(results: Results, title: str) -> str:
    lines = [f"| model | {title} | right, % | from fp32, points | loss, from fp32, % | bytes | images/s, relative |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for model, ways in results.items():
        base = ways["fp32"]
        for way, r in ways.items():
            (points, error), (loss, loss_error) = difference(r, base), loss_change(r, base)
            less = f" ({base.total / r.total:.1f}x less)" if base.total > 1.05 * r.total else ""
            change = [f"{points:+.1f} ± {error:.1f}", f"{loss:+.1f} ± {loss_error:.1f}"] if r is not base else ["", ""]
            speed = statistics.median(r.speed) / statistics.median(base.speed)
            right = f"{statistics.mean(r.quality):.1f}"
            lines.append(
                f"| {model} | {way} | {right} | {' | '.join(change)} | {r.total / 1e6:.1f} MB{less} | {speed:.2f} |"
            )
    return "\n".join(lines)


def complaints(trained: Results) -> list[str]:
    """What is worse than it may be."""
    found = []
    for model, ways in trained.items():
        points, _ = difference(ways["int8-mixed"], ways["fp32"])
        if points < -ALLOWED:
            found.append(f"{model} in int8-mixed is {-points:.1f} points below fp32; at most {ALLOWED} is allowed")
    return found


def draw(args: argparse.Namespace, source: Scenes | Folder, predictions: dict[str, dict[str, Tensor]]) -> list[str]:
    """The pictures of what the models of the first seed predict; returns the names of the files."""
    drawn = []
    for segments, name, picture in ((False, "classes.png", draw_classes), (True, "masks.png", draw_masks)):
        chosen = {model: ways for model, ways in predictions.items() if TASKS[model].segments == segments}
        if chosen:
            data = source.data(segments, 0, args.held_out, seed=1)
            shown = {model: {way: ways[way] for way in ("fp32", "int8-mixed")} for model, ways in chosen.items()}
            picture(args.output / name, data.held_out, data.classes, shown)
            drawn.append(name)
    return drawn


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help=f"some of {','.join(TASKS)}; default: all that fit the images")
    parser.add_argument("--images", type=Path, help="a folder with a folder of images for each class")
    parser.add_argument(
        "--size", type=int, default=32, help="images are scaled and cut to this many pixels (default 32)"
    )
    parser.add_argument("--full", action="store_true", help="ViT-S, ResNet-18, ConvNeXt-T and a UNet of width 64")
    parser.add_argument("--swap", choices=("all", "faster"), default="all", help=SWAP_HELP)
    parser.add_argument("--output", type=Path, default=Path("runs/vision"))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default 3)")
    parser.add_argument("--steps", type=int, help=f"of a training (default: {STEPS})")
    parser.add_argument("--batch", type=int, default=32, help="images in a step (default 32)")
    parser.add_argument("--held-out", type=int, default=1000, help="images to test on (default 1000)")
    parser.add_argument("--threads", type=int, help="of the CPU; one gives a fair speed where other programs run too")
    args = parser.parse_args(arguments)
    args.models = (
        args.models.split(",") if args.models else [m for m in TASKS if not (args.images and TASKS[m].segments)]
    )
    for name in args.models:
        if name not in TASKS:
            parser.error(f"--models {name}: there are {', '.join(TASKS)}")
        if args.images and TASKS[name].segments:
            parser.error(f"--models {name}: a folder of images says nothing about their pixels; leave out --images")
    steps = IGNORED + 1 if args.steps is None else args.steps
    if min(args.seeds, args.batch, args.held_out) < 1 or steps <= IGNORED or args.size % 16:
        parser.error(
            f"--seeds, --batch and --held-out must be at least 1, --steps {IGNORED + 1}, --size a multiple of 16"
        )
    if not args.images and args.size < SMALLEST:
        parser.error(f"--size {args.size}: scenes need {SMALLEST} pixels")
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    running.quiet()
    source = Folder(args.images, args.size) if args.images else Scenes(args.size)
    trained, used, predictions = run(args, source)
    report = f"{table(trained, 'trained in')}\n\n{table(used, 'used in')}\n"
    results = {
        group: {model: {way: asdict(r) for way, r in ways.items()} for model, ways in part.items()}
        for group, part in (("trained", trained), ("used", used))
    }
    running.save(args.output, args, report, "vision.md", **results)
    drawn = draw(args, source, predictions)
    print(f"\n{report}\nin {args.output}: vision.md, results.json, {', '.join(drawn)}")
    return running.status(complaints(trained))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
