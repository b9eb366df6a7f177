"""Pictures of what models see and say, large enough to read on a telephone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from vision_data import Images

Predictions = dict[str, dict[str, Tensor]]
"""Model -> way -> what it predicts of each held-out image: int64 [images], or [images, height, width]."""

SHOWN, LABELS, LINE = 6, 2.6, 0.36  # images; inches of the labels beside them, and of a line of text
COLOURS = (
    *("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#9a6324", "#ffffff"),
    "#202020",
)
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_classes(path: Path, images: Images, classes: tuple[str, ...], predictions: Predictions) -> None:
    """Images, and below each its class and what the models say. The first half are the first of the held-out images;
    the others are the next ones that at least one model gets wrong."""
    truth = images.targets
    says = torch.stack([prediction for ways in predictions.values() for prediction in ways.values()])
    failed = (says != truth).any(0)
    failed[: SHOWN // 2] = False
    chosen = [*range(SHOWN // 2), *failed.nonzero().flatten().tolist()][:SHOWN]
    rows = [(f"{model}, {way}", predicted) for model, ways in predictions.items() for way, predicted in ways.items()]
    rows.insert(0, ("truth", truth))
    width, height = LABELS + len(chosen), 1 + LINE * (len(rows) + 0.4)
    figure = Figure(figsize=(width, height))
    for line, (name, predicted) in enumerate(rows):
        y = (height - 1 - LINE * (line + 0.6)) / height
        figure.text((LABELS - 0.2) / width, y, name, fontsize=16, ha="right", va="center")
        for place, number in enumerate(chosen):
            said = int(predicted[number])
            colour = "black" if predicted is truth else RIGHT if said == truth[number] else WRONG
            x = (LABELS + place + 0.5) / width
            figure.text(x, y, classes[said], color=colour, fontsize=16, weight="bold", ha="center", va="center")
    for place, number in enumerate(chosen):
        box = ((LABELS + place + 0.03) / width, 1 - 0.97 / height, 0.94 / width, 0.94 / height)
        _show(figure.add_axes(box), images.images[number])
    figure.savefig(path, dpi=100)


def draw_masks(path: Path, images: Images, classes: tuple[str, ...], predictions: Predictions) -> None:
    """Rows: the first held-out images, the truth, what each way predicts; a colour for each class."""
    (ways,) = predictions.values()
    palette = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS]) / 255
    rows = [("image", None), ("truth", images.targets), *ways.items()]
    figure = Figure(figsize=(LABELS - 0.9 + SHOWN, len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), SHOWN, squeeze=False)
    for (name, masks), line in zip(rows, axes, strict=True):
        for number, axis in enumerate(line[: len(images)]):
            _show(axis, images.images[number] if masks is None else palette[masks[number]].permute(2, 0, 1) * 2 - 1)
        line[0].set_ylabel(name, fontsize=16, rotation=0, ha="right", va="center")
    for colour, name in zip(COLOURS, classes, strict=True):
        axes[-1][0].plot([], [], "s", color=colour, markersize=11, markeredgecolor="gray", label=name)
    options = {"frameon": False, "handletextpad": 0, "columnspacing": 0.9, "fontsize": 15}
    figure.legend(loc="outside lower center", ncols=(len(classes) + 1) // 2, **options)
    figure.savefig(path, dpi=100)


def _show(axis: Any, image: Tensor) -> None:
    axis.imshow(((image.permute(1, 2, 0).clamp(-1, 1) + 1) / 2).numpy())
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_visible(False)
