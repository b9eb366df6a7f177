"""What ``bert.py`` says of its results: tables, pictures, and what is worse than it may be."""

from __future__ import annotations

import datetime
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bert_larger import Try
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lowbit_lightning.callbacks.observed import environment

ALLOWED = {"int8-mixed": 1.0, "nf4 + LoRA": 2.0, "nf4": 1.0}  # points of accuracy below fp32
COLORS = {"light": ("#1f2328", "#8c959f"), "dark": ("#e6edf3", "#6e7681")}  # of text, of lines
MARKS = {"fp32": "#8c959f", "int8-mixed": "#5b7be0", "fp32 + LoRA": "#a98b3c", "nf4 + LoRA": "#c2569b"}
MARKS |= {"int8": "#5b7be0", "nf4, first layer int8": "#8a5bc2", "nf4": "#c2569b", "int3": "#3f9c72", "int2": "#c9673a"}


@dataclass
class Result:
    """Of one way to train or to use the model: per seed, accuracy in percent and tokens per second. ``bytes``: by kind,
    as planned for training, as held for inference."""

    accuracy: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracy)


def difference(result: Result, base: Result) -> tuple[float, float]:
    """Mean of the paired differences in points of accuracy, and its standard error over the seeds."""
    pairs = [a - b for a, b in zip(result.accuracy, base.accuracy, strict=True)]
    return statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")


def table(results: dict[str, Result], title: str) -> str:
    base = results["fp32"]
    lines = [f"| {title} | accuracy, % | from fp32, points | bytes | tokens per second, relative |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, r in results.items():
        change = "{:+.1f} ± {:.1f}".format(*difference(r, base)) if r is not base else ""
        less = f" ({base.total / r.total:.1f}x less)" if r is not base else ""
        speed = statistics.median(r.speed) / statistics.median(base.speed)
        lines.append(f"| {name} | {r.mean:.1f} | {change} | {r.total / 1e6:,.1f} MB{less} | {speed:.2f} |")
    return "\n".join(lines)


def complaints(trained: dict[str, Result], used: dict[str, Result]) -> list[str]:
    """What is worse than it may be."""
    found = []
    for name, points in ALLOWED.items():
        results = trained if name in trained else used
        mean, _ = difference(results[name], results["fp32"])
        if mean < -points:
            found.append(f"{name} is {-mean:.1f} points of accuracy below fp32; at most {points} are allowed")
    return found


def origin(took: str) -> str:
    """When, where and how long it ran."""
    told = environment(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), 1)
    wanted = ("torch", "lightning", "transformers", "peft")
    versions = [f"{name} {told['packages'][name]}" for name in wanted if name in told["packages"]]
    return (
        f"{datetime.date.today()}, {told['device']}, {told['threads']} threads, Python {told['python']}, "
        f"{', '.join(versions)}; {took}"
    )


def draw(folder: Path, trained: dict[str, Result], used: dict[str, Result], tries: list[Try], budget: int) -> None:
    """``bert-light.svg`` and ``bert-dark.svg``, which differ in their colours."""
    for theme, (text, line) in COLORS.items():
        own = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), text)
        own |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), line)
        with rc_context({**own, "svg.fonttype": "none", "svg.hashsalt": "bert", "font.size": 9}):
            figure = Figure(figsize=(10.5, 3.6), layout="constrained")
            left, middle, *right = figure.subplots(1, 3 if tries else 2)
            _scatter(left, trained, "training", "MB of the training")
            _scatter(middle, used, "use in low bits, not trained further", "MB of the weights")
            if tries:
                _sizes(right[0], tries, budget, text)
            figure.savefig(folder / f"bert-{theme}.svg", transparent=True, metadata={"Date": None})


def _scatter(axes: Any, results: dict[str, Result], title: str, label: str) -> None:
    for name, r in results.items():
        spread = statistics.stdev(r.accuracy) if len(r.accuracy) > 1 else 0.0
        axes.errorbar(r.total / 1e6, r.mean, yerr=spread, fmt="o", capsize=3, color=MARKS[name], label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(title=title, xlabel=label, ylabel="accuracy, %")
    axes.legend(frameon=False)
    _plain(axes)


def _sizes(axes: Any, tries: list[Try], budget: int, text: str) -> None:
    """What each way takes for each shape: a dot where it trained, a cross where it failed, else a ring."""
    shapes = list(dict.fromkeys(one.shape for one in tries))
    for way in dict.fromkeys(one.way for one in tries):
        own = [one for one in tries if one.way == way]
        places = [shapes.index(one.shape) for one in own]
        axes.plot(places, [one.planned / 1e9 for one in own], color=MARKS[way], alpha=0.5, label=way)
        for place, one in zip(places, own, strict=True):
            mark = "o" if not one.seconds or one.failed is None else "X"
            face = MARKS[way] if one.seconds else "none"
            axes.plot(place, one.planned / 1e9, mark, color=MARKS[way], markerfacecolor=face)
    axes.axhline(budget / 1e9, linestyle="--", color=text, linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), shapes, rotation=30)
    axes.set(title=f"a larger BERT in {budget / 1e9:g} GB", ylabel="GB of the training, planned")
    axes.legend(frameon=False)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
