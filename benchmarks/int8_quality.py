"""What int8 products cost in quality: the example's GPT in bf16-mixed and int8-mixed, on paired seeds.

    python benchmarks/int8_quality.py [--seeds 3] [--only switchback] [--output docs/benchmarks] [--steps 1000 ...]
    python benchmarks/int8_quality.py --encoder --only none --width 512 --layers 6 --heads 8 ...

The runs of a seed have the same initial weights, the same batches and the same optimizer, torch's AdamW in 32 bits;
they differ in the precision alone. SwitchBack is ``grad_weight="high"`` (Wortsman et al., 2023); "stochastic" rounds
gradients at random. ``--encoder`` trains ``nn.TransformerEncoder`` instead, beside fp32. The settings of
``examples/train_gpt.py`` are options here too; ``--steps`` defaults to 1000. All layers run in int8 (``swap="all"``),
also those that are slower, so that the losses do not depend on the machine.

The exit status is 1 if a mean validation loss is more than 1 % from the first row's, if SwitchBack's is worse than
plain int8's by more than 0.5 % and two standard errors, or if int8 products were not as many as predicted.
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
from _encoder import Encoder
from torch import Tensor

from lowbit_lightning import Int8MixedPrecision

sys.path.insert(0, str(ROOT / "examples"))
train_gpt: Any = importlib.import_module("train_gpt")

BASE, PLAIN, SWITCHBACK = "bf16-mixed", "int8-mixed", "int8-mixed, SwitchBack"
FLOAT32 = "32-true"
RUNS: dict[str, dict[str, Any] | None] = {
    BASE: None,
    FLOAT32: None,
    PLAIN: {},
    SWITCHBACK: {"grad_weight": "high"},
    "int8-mixed, stochastic": {"gradient_rounding": "stochastic"},
}
ALLOWED = 1.0  # percent


class _EncoderGPT(train_gpt.GPT):
    """The loss, data and optimizer of the example, and torch's own encoder with a causal mask."""

    def __init__(self, settings: Any, optimizer: Any) -> None:
        super().__init__(settings, optimizer)
        del self.tokens, self.blocks, self.norm
        encoder = Encoder(settings.width, settings.layers, settings.heads)
        self.head, self.encoder = encoder.head, encoder

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens).float()


def train(settings: Any, seeds: int, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What ``train_gpt.run`` returns, for every name a list over seeds."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    text = train_gpt.Text(settings)
    for seed in range(1, seeds + 1):
        for name in names:
            start = time.perf_counter()
            options = RUNS[name]
            precision = name if options is None else Int8MixedPrecision(**options, swap="all")
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
    """``results``: those to compare with come first."""
    found, base = [], next(iter(results))
    for name, runs in results.items():
        change = statistics.mean(differences(runs, results[base]))
        if not abs(change) <= ALLOWED:
            found.append(f"{name} is {change:+.2f} % from {base}; at most {ALLOWED} % is allowed")
        ran, predicted = (sum(run[key] for run in runs) for key in ("int8_matmuls", "int8_matmuls_predicted"))
        if ran != predicted or (name != base and ran == 0):
            found.append(f"{name}: {ran} int8 matmuls ran, {predicted} predicted")
    if PLAIN in results and SWITCHBACK in results:
        worse = differences(results[SWITCHBACK], results[PLAIN])
        if statistics.mean(worse) > max(ALLOWED / 2, 2 * error(worse)):
            found.append(f"SwitchBack is {statistics.mean(worse):+.2f} % worse than {PLAIN}, which quantises more")
    return found


def add(report: Report, results: dict[str, list[dict[str, Any]]]) -> None:
    rows, base = [], next(iter(results))
    for name, runs in results.items():
        spread = f" ± {statistics.stdev(losses(runs)):.4f}" if len(runs) > 1 else ""
        paired = differences(runs, results[base])
        rows.append(
            [
                *(name, f"{statistics.mean(losses(runs)):.4f}{spread}"),
                "-" if name == base else f"{statistics.mean(paired):+.3f} % ± {error(paired):.3f}",
                "-" if name == base else ", ".join(f"{value:+.2f}" for value in paired),
                f"{sum(run['int8_matmuls'] for run in runs):,}",
                f"{statistics.median(run['tokens_per_second'] for run in runs):,.0f}",
            ]
        )
    header = ["precision", "validation loss", f"from {base}, paired", "each seed, %", "int8 matmuls", "tokens/s"]
    report.table(header, rows)


def parse() -> tuple[argparse.Namespace, Any]:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    result.add_argument("--seeds", type=int, default=3, help="runs of each precision")
    result.add_argument("--encoder", action="store_true", help="nn.TransformerEncoder instead of the GPT")
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
    others = [n for n in RUNS if RUNS[n] and (not wanted or any(part in n.lower() for part in wanted))]
    what, base = ("nn.TransformerEncoder", FLOAT32) if arguments.encoder else ("GPT", BASE)
    if arguments.encoder:
        train_gpt.GPT = _EncoderGPT
    report = Report("int8 quality encoder" if arguments.encoder else "int8 quality", arguments)
    report.add(
        f"{what} on bytes: {settings.layers} layers of width {settings.width}, {settings.steps} steps of "
        f"{settings.batch} windows of {settings.context} bytes, {arguments.seeds} seeds. Losses in nats per byte on "
        "held-out text, mean and standard deviation over seeds; of the paired differences, mean and standard error.",
        "",
    )
    with tempfile.TemporaryDirectory() as folder:
        results = train(dataclasses.replace(settings, out=folder), arguments.seeds, [base, PLAIN, *others])
    add(report, results)
    failures = complaints(results)
    report.add(*[f"FAILED: {failure}" for failure in failures] or ["All within the limits."])
    report.save()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
