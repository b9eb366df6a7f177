"""Trains a byte-level GPT twice, in fp32 and in int8 with an 8-bit optimizer, and compares the two.

    python examples/train_gpt.py                          # under five minutes on two cores
    python examples/train_gpt.py --full                   # a larger model, for a machine with time or a GPU
    python examples/train_gpt.py --full --steps 12 --validation-batches 1       # speed alone, beside bf16-mixed's
    python examples/train_gpt.py --text book.txt --steps 2000
    python examples/train_gpt.py --config my.yaml --width 512
    torchrun --nproc-per-node 2 examples/train_gpt.py --devices 2 --strategy lowbit_sharded    # --nodes 2 on two nodes
    python examples/train_gpt.py --devices 2 --strategy lowbit_deepspeed_stage_2               # or torchrun, as above

The text is the Python standard library of the interpreter that runs this, unless ``--text`` names a file or folder.
Both runs start from the same weights and see the same windows of it in the same order. Run 1 is plain Lightning with
``torch.optim.AdamW``; run 2 differs in two lines: ``precision="int8-mixed"`` and ``lowbit_lightning.optim.AdamW``.
With ``--bf16``, which ``--full`` includes, a run in between differs from run 1 in ``precision="bf16-mixed"``.

Everything lands in ``--out`` (runs/train_gpt): checkpoints, CSV logs, results.json, loss.png. The exit status is 1 if
the int8 run's validation loss is not within ``tolerance`` of fp32's, or if the number of int8 matmuls that ran is not
the one that arithmetic predicts.

``gpt.py`` holds the model and the text, ``gpt_settings.py`` all settings and the command line.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import running
import torch
from gpt import GPT, Text
from gpt_settings import Settings, parse
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException
from matplotlib.figure import Figure
from torch import Tensor

import lowbit_lightning
from lowbit_lightning import kernels, layers
from lowbit_lightning.layers.int8 import fewest_rows


def run(name: str, settings: Settings, text: Text, precision: Any, low_bit: bool = False) -> dict[str, Any]:
    """Trains once and returns what results.json says of it. ``precision``: a name that the Trainer knows, or a
    precision plugin; ``low_bit``: whether the optimizer keeps its state in 8 bits."""
    optimizer = lowbit_lightning.optim.AdamW if low_bit else partial(torch.optim.AdamW, fused=True)
    L.seed_everything(settings.seed, workers=True, verbose=False)
    meter = Meter()
    csv = CSVLogger(settings.out, name=name)  # in version_0, version_1, ...: nothing is overwritten
    loggers: list[Logger] = [csv]
    if settings.tensorboard:
        loggers.append(TensorBoardLogger(settings.out, name=name, version=csv.version))
    trainer = L.Trainer(
        **{"precision": precision} if isinstance(precision, str) else {"plugins": precision},
        max_steps=settings.steps,
        val_check_interval=settings.validate_every,
        num_sanity_val_steps=0,
        strategy=strategy_of(settings),
        devices=settings.devices,
        num_nodes=settings.nodes,
        logger=loggers,
        log_every_n_steps=10,
        callbacks=[meter, ModelCheckpoint(monitor="val_loss", save_last=True)],
        enable_progress_bar=settings.progress,
        enable_model_summary=name == "fp32",
    )
    kernels.reset_calls()
    trainer.fit(GPT(settings, optimizer), text)
    calls = kernels.calls()
    timed = meter.seconds[meter.WARM_UP :] or meter.seconds
    _, loss, perplexity = meter.validations[-1]
    return {
        "name": name,
        "val_loss": loss,
        "val_perplexity": perplexity,
        "tokens_per_second": trainer.world_size * settings.batch * settings.context * len(timed) / sum(timed),
        "optimizer_state_bytes": meter.optimizer_bytes,
        "parameter_bytes": meter.parameter_bytes,
        "int8_layers": meter.int8_layers,
        "int8_matmuls": sum(count for (op, _), count in calls.items() if op == "int8_matmul"),
        "int8_matmuls_predicted": meter.int8_calls,
        "kernels": {f"{op} on {backend}": count for (op, backend), count in sorted(calls.items())},
        "train_losses": meter.train_losses,
        "validations": meter.validations,
    }


def strategy_of(settings: Settings) -> Any:
    """Strategies of ours would convert torch's optimizer, which the first run is to keep."""
    if not settings.strategy.startswith("lowbit"):
        return settings.strategy
    strategy: Any = StrategyRegistry.get(settings.strategy)
    strategy.optimizer_bits = None
    return strategy


class Meter(L.Callback):
    """Keeps the losses, the time spent in training steps, and what the run holds in memory."""

    WARM_UP = 3  # steps not timed: kernels are compiled and caches filled in them

    def __init__(self) -> None:
        self.train_losses: list[float] = []
        self.validations: list[tuple[int, float, float]] = []  # (step, loss, perplexity)
        self.seconds: list[float] = []
        self.int8_layers = self.int8_calls = self.optimizer_bytes = self.parameter_bytes = 0
        self.started = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        products = int8_products(module)
        self.int8_layers = len(products)
        self.int8_calls += sum(map(len, products))  # three of each layer by default; every input here needs a gradient
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.train_losses.append(float(outputs["loss"]))  # waits for the device
        self.seconds.append(time.perf_counter() - self.started)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        if batch[:, 1:].numel() >= fewest_rows(next(module.parameters())):  # fewer don't pay for int8 in evaluation
            self.int8_calls += len(int8_products(module))  # forward only

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.validations.append((trainer.global_step, float(metrics["val_loss"]), float(metrics["val_perplexity"])))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        states = trainer.optimizers[0].state.values()
        self.optimizer_bytes = sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))
        self.parameter_bytes = sum(getattr(p, "ds_tensor", p).nbytes for p in module.parameters())  # ZeRO-3's share


def int8_products(module: torch.nn.Module) -> list[tuple[str, ...]]:
    """The names of the int8 products of each int8 layer. After the first step these are fewer: layers that are slower
    in int8 on this machine go on in high precision."""
    return [m.products.int8 for m in module.modules() if isinstance(m, layers.Int8Layer)]


def report(runs: list[dict[str, Any]]) -> str:
    plain, low = runs[0], runs[-1]
    rows = [
        ("", lambda r: r["name"]),
        ("validation loss", lambda r: f"{r['val_loss']:.4f}"),
        ("validation perplexity", lambda r: f"{r['val_perplexity']:.3f}"),
        ("tokens per second", lambda r: f"{r['tokens_per_second']:,.0f}"),
        ("  relative", lambda r: f"{r['tokens_per_second'] / plain['tokens_per_second']:.2f}"),
        ("optimizer state, bytes", lambda r: f"{r['optimizer_state_bytes']:,}"),
        ("parameters, bytes", lambda r: f"{r['parameter_bytes']:,}"),
        ("linear layers in int8", lambda r: f"{r['int8_layers']:,}"),
        ("int8 matmuls", lambda r: f"{r['int8_matmuls']:,}"),
        ("int8 matmuls predicted", lambda r: f"{r['int8_matmuls_predicted']:,}"),
    ]
    lines = [f"{title:<24}" + "".join(f"{cell(r):>16}" for r in runs) for title, cell in rows]
    lines += [f"kernels that ran in {low['name']}:", *(f"  {name}: {n:,}" for name, n in low["kernels"].items())]
    return "\n".join(lines)


def complaints(plain: dict[str, Any], low: dict[str, Any], tolerance: float) -> list[str]:
    """What is wrong with the outcome, in words; nothing if all is well."""
    found = []
    difference = low["val_loss"] / plain["val_loss"] - 1
    if not abs(difference) <= tolerance:
        found.append(
            f"the int8 run's validation loss {low['val_loss']:.4f} is {difference:+.2%} of fp32's "
            f"{plain['val_loss']:.4f} away; at most {tolerance:.2%} is allowed"
        )
    if low["int8_matmuls"] == 0 or low["int8_matmuls"] != low["int8_matmuls_predicted"]:
        found.append(
            f"{low['int8_matmuls']} int8 matmuls ran in {low['int8_layers']} layers; arithmetic predicts "
            f"{low['int8_matmuls_predicted']} (3 per layer and training step, 1 per layer and validation batch)"
        )
    return found


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for one, colour in zip(runs, ("tab:blue", "tab:orange", "tab:green"), strict=False):
        axes.plot(one["train_losses"], color=colour, alpha=0.35, linewidth=1)
        steps, losses, _ = zip(*one["validations"], strict=True)
        axes.plot(steps, losses, "o-", color=colour, label=f"{one['name']}: validation {losses[-1]:.4f}")
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="GPT on bytes; faint: training loss")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(arguments: list[str]) -> int:
    settings = parse(arguments)
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the text is in memory
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning 2.6.6 with torch 2.13
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated")  # DeepSpeed 0.19 with torch 2.13
    text = Text(settings)
    print(f"{len(text.train):,} bytes to train on, {len(text.validation):,} to validate on; {settings}")
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    try:
        runs = [run("fp32", settings, text, "32-true")]
        if settings.bf16:
            runs.append(run("bf16-mixed", settings, text, "bf16-mixed"))
        runs.append(run("int8-mixed", settings, text, "int8-mixed", low_bit=True))
    except SIGTERMException:  # by itself it would end the program with status 0
        print("stopped by SIGTERM", file=sys.stderr)
        return 143

    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return 0  # rank 0 reports
    results = {"settings": dataclasses.asdict(settings), "torch": torch.__version__, "runs": runs}
    (Path(settings.out) / "results.json").write_text(json.dumps(results, indent=1))
    draw(Path(settings.out) / "loss.png", runs)
    print(f"\n{report(runs)}\n\nin {settings.out}: results.json, loss.png, logs and checkpoints")
    return running.status(complaints(runs[0], runs[-1], settings.tolerance))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
