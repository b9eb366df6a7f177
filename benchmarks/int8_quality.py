"""What int8 products cost in quality: the example's GPT in bf16-mixed and int8-mixed, on paired seeds.

    python benchmarks/int8_quality.py [--seeds 3] [--only switchback] [--output docs/benchmarks] [--steps 1000 ...]

The runs of a seed have the same initial weights, the same batches and the same optimizer, torch's AdamW in 32 bits;
they differ in the precision alone. SwitchBack is ``grad_weight="high"`` (Wortsman et al., 2023); "stochastic" rounds
gradients at random. The settings of ``examples/train_gpt.py`` are options here too; ``--steps`` defaults to 1000.

The exit status is 1 if a mean validation loss is more than 1 % from bf16-mixed's, if SwitchBack's is worse than plain
int8's by more than 0.5 % and two standard errors, or if int8 products were not as many as predicted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, Report

from lowbit_lightning import Int8MixedPrecision

sys.path.insert(0, str(ROOT / "examples"))
train_gpt: Any = importlib.import_module("train_gpt")

BASE, PLAIN, SWITCHBACK = "bf16-mixed", "int8-mixed", "int8-mixed, SwitchBack"
RUNS: dict[str, dict[str, Any] | None] = {
    BASE: None,
    PLAIN: {},
    SWITCHBACK: {"grad_weight": "high"},
    "int8-mixed, stochastic": {"gradient_rounding": "stochastic"},
}
ALLOWED = 1.0  # percent


def train(settings: Any, seeds: int, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What ``train_gpt.run`` returns, for every name a list over seeds."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    text = train_gpt.Text(settings)
    for seed in range(1, seeds + 1):
        for name in names:
            start = time.perf_counter()
            options = RUNS[name]
            precision = BASE if options is None else Int8MixedPrecision(**options)
            own = dataclasses.replace(settings, seed=seed)
            results[name].append(train_gpt.run(name, own, text, precision))
            loss = results[name][-1]["val_loss"]
            print(f"seed {seed}: {name}: {loss:.4f}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return results


def losses(runs: list[dict[str, Any]]) -> list[float]:
    return [run["val_loss"] for run in runs]


def differences(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[float]:
    """Percent, seed for seed."""
    return [100 * (a / b - 1) for a, b in zip(losses(runs), losses(base), strict=True)]


def error(values: list[float]) -> float:
    """The standard error of the mean; 0 of a single value, which has none."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def complaints(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    found = []
    for name, runs in results.items():
        change = statistics.mean(differences(runs, results[BASE]))
        if not abs(change) <= ALLOWED:
            found.append(f"{name} is {change:+.2f} % from {BASE}; at most {ALLOWED} % is allowed")
        ran, predicted = (sum(run[key] for run in runs) for key in ("int8_matmuls", "int8_matmuls_predicted"))
        if ran != predicted or (name != BASE and ran == 0):
            found.append(f"{name}: {ran} int8 matmuls ran, {predicted} predicted")
    if PLAIN in results and SWITCHBACK in results:
        worse = differences(results[SWITCHBACK], results[PLAIN])
        if statistics.mean(worse) > max(ALLOWED / 2, 2 * error(worse)):
            found.append(f"SwitchBack is {statistics.mean(worse):+.2f} % worse than {PLAIN}, which quantises more")
    return found


def add(report: Report, results: dict[str, list[dict[str, Any]]]) -> None:
    rows = []
    for name, runs in results.items():
        spread = f" ± {statistics.stdev(losses(runs)):.4f}" if len(runs) > 1 else ""
        paired = differences(runs, results[BASE])
        rows.append(
            [
                *(name, f"{statistics.mean(losses(runs)):.4f}{spread}"),
                "-" if name == BASE else f"{statistics.mean(paired):+.3f} % ± {error(paired):.3f}",
                "-" if name == BASE else ", ".join(f"{value:+.2f}" for value in paired),
                f"{sum(run['int8_matmuls'] for run in runs):,}",
                f"{statistics.median(run['tokens_per_second'] for run in runs):,.0f}",
            ]
        )
    header = ["precision", "validation loss", f"from {BASE}, paired", "each seed, %", "int8 matmuls", "tokens/s"]
    report.table(header, rows)


def parse() -> tuple[argparse.Namespace, Any]:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    result.add_argument("--seeds", type=int, default=3, help="runs of each precision")
    result.add_argument("--only", default="", help=f"comma-separated parts of names, beside {BASE} and {PLAIN}")
    result.add_argument("--output", type=Path, help="a Markdown file to write, or a folder to write a dated one into")
    arguments, rest = result.parse_known_args()
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"  # as the Trainer finds it
    defaults = ["--steps", "1000", "--validate-every", "1000", "--validation-batches", "64", "--no-progress"]
    return arguments, train_gpt.parse([*defaults, *rest])


def main() -> int:
    arguments, settings = parse()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    wanted = [part.lower() for part in arguments.only.split(",") if part]
    others = [n for n in RUNS if n not in (BASE, PLAIN) and (not wanted or any(part in n.lower() for part in wanted))]
    report = Report("int8 quality", arguments)
    report.add(
        f"GPT on bytes: {settings.layers} layers of width {settings.width}, {settings.steps} steps of {settings.batch} "
        f"windows of {settings.context} bytes, {arguments.seeds} seeds. Losses in nats per byte on held-out text, "
        "mean and standard deviation over seeds; of the paired differences, mean and standard error.",
        "",
    )
    with tempfile.TemporaryDirectory() as folder:
        results = train(dataclasses.replace(settings, out=folder), arguments.seeds, [BASE, PLAIN, *others])
    add(report, results)
    failures = complaints(results)
    report.add(*[f"FAILED: {failure}" for failure in failures] or ["All within the limits."])
    report.save()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
