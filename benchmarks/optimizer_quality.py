"""What 8-bit states cost in quality: every optimizer at 32 and 8 bits, on paired seeds.

    python benchmarks/optimizer_quality.py [--quick] [--seeds 5] [--only adam,lion] [--output docs/benchmarks]

Two tasks: ``gpt``, a small causal transformer over the bytes of Python's standard library, and ``digits``, a small
vision transformer on scikit-learn's 8x8 digits (80 % for training). A pair of runs has the same initial weights and the
same batches; it differs in ``bits`` alone, so that the difference of a pair shows what 8 bits do, and the spread over
seeds what chance does. Learning rates were chosen for 32 bits. ``--output`` gets a Markdown file and pictures.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _common import Report
from torch import Tensor, nn
from torch.nn import functional

from lowbit_lightning import optim

# -- optimizers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """An optimizer with its options, and a learning rate for each task."""

    name: str
    kind: str
    gpt: float
    digits: float
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, task: str, model: nn.Module, bits: int, steps: int) -> optim.LowBitOptimizer:
        scheduled = {k: steps if v == "steps" else v for k, v in self.options.items()}
        return getattr(optim, self.kind)(model.parameters(), lr=getattr(self, task), bits=bits, **scheduled)


CONTENDERS = [
    Contender("SGD, momentum", "SGD", 0.1, 0.05, {"momentum": 0.9}),
    Contender("SGD, Nesterov", "SGD", 0.1, 0.02, {"momentum": 0.9, "nesterov": True}),
    Contender("Adam", "Adam", 3e-3, 2e-3),
    Contender("Adam, amsgrad", "Adam", 3e-3, 2e-3, {"amsgrad": True}),
    Contender("AdamW", "AdamW", 3e-3, 2e-3, {"weight_decay": 0.1}),
    Contender("RMSprop", "RMSprop", 1e-3, 1e-3),
    Contender("RMSprop, centered, momentum", "RMSprop", 3e-4, 3e-4, {"centered": True, "momentum": 0.9}),
    Contender("Adagrad", "Adagrad", 2e-2, 1e-2),
    Contender("Lion", "Lion", 1e-3, 6e-4, {"weight_decay": 0.1}),
    Contender("LAMB", "LAMB", 1e-2, 1e-2),
    Contender("LARS", "LARS", 1.0, 1.0, {"trust_coefficient": 1e-2}),
    Contender("AdEMAMix", "AdEMAMix", 2e-3, 2e-3),
    Contender("AdEMAMix, scheduled", "AdEMAMix", 2e-3, 2e-3, {"t_alpha": "steps", "t_beta3": "steps"}),
]

# -- models ------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a two-layer network, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [batch, length, width]
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.network(self.norms[1](x))


class Transformer(nn.Module):
    """``embed`` makes [batch, length, width]; blocks; a norm; the mean over the length for classes; a linear head."""

    def __init__(self, embed: nn.Module, length: int, width: int, layers: int, classes: int, causal: bool) -> None:
        super().__init__()
        self.embed, self.causal = embed, causal
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, 4, causal) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embed(x) + self.position))
        return self.head(x if self.causal else x.mean(1))


# -- tasks -------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A model, its batches, and what it is judged by."""

    name: str
    steps: int
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    accuracy: bool

    def judge(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy on what is held out."""
        with torch.no_grad():
            x, y = self.held_out
            parts = [model(part) for part in x.split(256)]
        scores, y = torch.cat(parts).flatten(0, -2), y.flatten()
        return float(functional.cross_entropy(scores, y)), float((scores.argmax(-1) == y).float().mean())


def gpt(quick: bool, device: str) -> Task:
    """Bytes of the standard library's sources; the last tenth is held out."""
    context, width, layers = (32, 64, 1) if quick else (64, 96, 2)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
    cut = len(text) * 9 // 10

    def windows(part: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.randint(0, len(part) - context - 1, (count, 1), generator=generator)
        rows = part[start + torch.arange(context + 1)].long().to(device)
        return rows[:, :-1], rows[:, 1:]

    return Task(
        "gpt",
        40 if quick else 400,
        lambda: Transformer(nn.Embedding(256, width), context, width, layers, 256, causal=True),
        lambda generator: windows(text[:cut], 16, generator),
        windows(text[cut:], 64 if quick else 512, torch.Generator().manual_seed(0)),
        accuracy=False,
    )


def digits(quick: bool, device: str) -> Task:
    """8x8 images as sixteen patches of 2x2."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(f"{error}; pip install 'lowbit-lightning[benchmarks]' brings scikit-learn") from error
    width, layers = (64, 1) if quick else (64, 2)
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(data.images, dtype=torch.float32)[order] / 8 - 1
    patches = pixels.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2).to(device)  # [n, 16, 4]
    labels = torch.tensor(data.target)[order].to(device)
    cut = len(labels) * 8 // 10

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, cut, (64,), generator=generator).to(device)
        return patches[chosen], labels[chosen]

    return Task(
        "digits",
        40 if quick else 400,
        lambda: Transformer(nn.Linear(4, width), 16, width, layers, 10, causal=False),
        batch,
        (patches[cut:], labels[cut:]),
        accuracy=True,
    )


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The end of a run and the way there."""

    loss: float
    accuracy: float
    curve: list[tuple[int, float]]
    state_bytes: float
    """Per parameter."""


def train(task: Task, contender: Contender, bits: int, seed: int, device: str) -> Run:
    torch.manual_seed(seed)
    model = task.model().to(device)
    optimizer = contender.build(task.name, model, bits, task.steps)
    generator = torch.Generator().manual_seed(1000 + seed)
    curve: list[tuple[int, float]] = []
    recent: list[Tensor] = []
    for step in range(1, task.steps + 1):
        x, y = task.batch(generator)
        loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent.append(loss.detach())
        if step % max(1, task.steps // 30) == 0:
            curve.append((step, float(torch.stack(recent).mean())))
            recent = []
    final, accuracy = task.judge(model)
    tensors = [x for state in optimizer.state.values() for x in state.values()]
    taken = sum(x.numel() * x.element_size() for x in tensors)
    return Run(final, accuracy, curve, taken / sum(p.numel() for p in model.parameters()))


@dataclass
class Pairs:
    """An optimizer's runs of one task, seed by seed."""

    contender: Contender
    runs: dict[int, list[Run]]

    def losses(self, bits: int) -> list[float]:
        return [run.loss for run in self.runs[bits]]

    def differences(self) -> list[float]:
        """Of the losses, in percent, 8 bits over 32."""
        return [100 * (low / full - 1) for low, full in zip(self.losses(8), self.losses(32), strict=True)]

    def row(self, task: Task) -> list[str]:
        change = self.differences()
        error = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else float("nan")
        row = [self.contender.name, f"{getattr(self.contender, task.name):g}"]
        row += [spread(self.losses(bits), 4) for bits in (32, 8)]
        row.append(f"{statistics.mean(change):+.2f} ± {error:.2f} %")
        return [*row, ", ".join(f"{self.runs[bits][0].state_bytes:.2f}" for bits in (32, 8))]

    def accuracies(self) -> list[str]:
        return [self.contender.name, *(spread([100 * run.accuracy for run in self.runs[bits]], 2) for bits in (32, 8))]


def spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


# -- report ------------------------------------------------------------------------------------------------------------


def compare(task: Task, contenders: list[Contender], arguments: argparse.Namespace, report: Report) -> list[Pairs]:
    results = []
    for contender in contenders:
        start = time.perf_counter()
        runs: dict[int, list[Run]] = {32: [], 8: []}
        for seed in range(arguments.seeds):
            for bits in runs:
                runs[bits].append(train(task, contender, bits, seed, arguments.device))
        results.append(Pairs(contender, runs))
        print(f"{task.name}: {contender.name}, {time.perf_counter() - start:.0f} s", flush=True)
    header = ["optimizer", "rate", "loss, 32 bits", "8 bits", "8 over 32, paired", "state bytes"]
    report.add(f"## {task.name}: {task.steps} steps, {arguments.seeds} pairs", "")
    report.table(header, [pairs.row(task) for pairs in results])
    if task.accuracy:
        report.table(["accuracy, %", "32 bits", "8 bits"], [pairs.accuracies() for pairs in results])
    worst = max(results, key=lambda pairs: abs(statistics.mean(pairs.differences())))
    mean = statistics.mean(worst.differences())
    report.add(f"Farthest from its 32-bit twin: {worst.contender.name}, {mean:+.2f} % of the loss.", "")
    return results


def draw_curves(path: Path, task: Task, results: list[Pairs]) -> None:
    """Training losses, mean over seeds and the range of all of them, one panel for each optimizer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, pairs in zip(panels.flat, results, strict=False):
        for bits, colour, style in ((32, "#4477aa", "-"), (8, "#cc3311", "--")):
            steps = [step for step, _ in pairs.runs[bits][0].curve]
            losses = torch.tensor([[loss for _, loss in run.curve] for run in pairs.runs[bits]])
            panel.plot(steps, losses.mean(0), style, color=colour, label=f"{bits} bits", linewidth=1.3)
            panel.fill_between(steps, losses.amin(0), losses.amax(0), color=colour, alpha=0.15, linewidth=0)
        panel.set_title(pairs.contender.name, fontsize=9)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(ScalarFormatter() if losses.amax() < 10 * losses.amin() else NullFormatter())
        panel.tick_params(which="both", labelsize=7)
    for panel in list(panels.flat)[len(results) :]:
        panel.set_visible(False)
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(f"{task.name}: training loss over steps; bands: all seeds", fontsize=10)
    figure.savefig(path, dpi=90)


def draw_differences(path: Path, tasks: list[tuple[Task, list[Pairs]]]) -> None:
    """The paired difference of every seed, and 1 % to either side."""
    from matplotlib.figure import Figure

    names = [pairs.contender.name for pairs in tasks[0][1]]
    figure = Figure(figsize=(5.2 * len(tasks), 0.32 * len(names) + 1.2), layout="constrained")
    for panel, (task, results) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        panel.axvspan(-1, 1, color="0.93")
        panel.axvline(0, color="0.6", linewidth=0.8)
        for i, pairs in enumerate(results):
            change = pairs.differences()
            panel.plot(change, [i] * len(change), "o", color="#4477aa", markersize=3.5, alpha=0.7)
            panel.plot(statistics.mean(change), i, "|", color="#cc3311", markersize=13, markeredgewidth=2)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.invert_yaxis()
        panel.set_xlabel(f"{task.name}: loss with 8 bits over 32, %", fontsize=9)
    figure.savefig(path, dpi=90)


def parse() -> argparse.Namespace:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    available = "cuda" if torch.cuda.is_available() else "cpu"
    result.add_argument("--device", choices=("cpu", "cuda"), default=available, help=f"default here: {available}")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    result.add_argument("--seeds", type=int, help="pairs of runs for each optimizer; default 5, 2 with --quick")
    result.add_argument("--tasks", default="gpt,digits", help="comma-separated: gpt, digits")
    result.add_argument("--only", default="", help="comma-separated parts of names: train only these optimizers")
    result.add_argument("--quick", action="store_true", help="tiny models and 40 steps: shows that it runs, not more")
    result.add_argument("--output", type=Path, help="a folder to write Markdown and pictures into")
    arguments = result.parse_args()
    arguments.seeds = arguments.seeds or (2 if arguments.quick else 5)
    if unknown := set(arguments.tasks.split(",")) - {"gpt", "digits"}:
        result.error(f"--tasks must be gpt, digits or both, got {', '.join(sorted(unknown))}")
    if arguments.output and arguments.output.suffix:
        result.error(f"--output must be a folder, got {arguments.output}")
    return arguments


def main() -> None:
    arguments = parse()
    wanted = [part.lower() for part in arguments.only.split(",") if part]
    chosen = [c for c in CONTENDERS if not wanted or any(part in c.name.lower() for part in wanted)]
    if not chosen:
        raise SystemExit(f"--only {arguments.only} matches none of {[c.name for c in CONTENDERS]}")
    tasks_named = "" if "," in arguments.tasks else f" {arguments.tasks}"
    report = Report("Optimizer quality" + tasks_named + (" quick" if arguments.quick else ""), arguments)
    report.add("Means and standard deviations over seeds; of the paired differences, means and their standard errors.")
    report.add(
        "Losses are of held-out data, after the last step. Below 0 %: 8 bits did better. State bytes are those of a"
    )
    report.add("parameter, at 32 and at 8 bits.", "")
    makers = {"gpt": gpt, "digits": digits}
    tasks = [makers[name](arguments.quick, arguments.device) for name in arguments.tasks.split(",")]
    results = [(task, compare(task, chosen, arguments, report)) for task in tasks]
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        stem = f"{datetime.date.today()}-{report.name}-{arguments.device}"
        for task, pairs in results:
            draw_curves(arguments.output / f"{stem}-{task.name}.png", task, pairs)
            report.add(f"![{task.name}: training losses]({stem}-{task.name}.png)", "")
        draw_differences(arguments.output / f"{stem}-differences.png", results)
        report.add(f"![paired differences of all seeds]({stem}-differences.png)")
    report.save()


if __name__ == "__main__":
    main()
