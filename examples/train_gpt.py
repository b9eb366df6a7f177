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
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity

import lowbit_lightning
from lowbit_lightning import kernels, layers

HERE = Path(__file__).resolve().parent
VOCABULARY = 256  # bytes


@dataclasses.dataclass
class Settings:
    """Every setting; the command line (``--name value``) and ``--config FILE`` know these names and no others."""

    text: str = ""  # file or folder to train on; empty: Python's standard library
    out: str = "runs/train_gpt"
    width: int = 256
    layers: int = 3
    heads: int = 4
    context: int = 128  # bytes a prediction can look back on
    batch: int = 8  # windows per step and rank
    steps: int = 600
    warmup: int = 50
    validate_every: int = 150
    validation_batches: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 1
    tolerance: float = 0.01  # allowed relative difference of the two validation losses
    bf16: bool = False  # train in bf16-mixed too
    strategy: str = "auto"  # auto, ddp, lowbit_sharded, lowbit_deepspeed_stage_2 or any other that Lightning knows
    devices: int = 1  # ranks on this node
    nodes: int = 1
    tensorboard: bool = False  # log for TensorBoard too
    progress: bool = True


# ---------------------------------------------------------------------------------------------------------------------
# Text


def read_text(path: str) -> bytes:
    """All bytes of a file, or of every file below a folder, in the order of a hash of their names: the same order on
    every machine, and one in which the tail is a fair sample of the whole."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    if root.is_file():
        text = root.read_bytes()
    elif root.is_dir():
        skipped = {"test", "tests", "site-packages", "dist-packages", "__pycache__"} if not path else {".git"}
        names = {p.relative_to(root).as_posix(): p for p in root.rglob("*" if path else "*.py") if p.is_file()}
        names = {name: p for name, p in names.items() if not skipped & set(Path(name).parts)}
        ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        text = b"\n".join(names[name].read_bytes() for name in ordered)
    else:
        raise SystemExit(f"text={path!r}: no such file or folder")
    return text


class Windows(torch.utils.data.Dataset[Tensor]):
    """``count`` batches of random windows [batch, context + 1]; batch i is the same whenever and by whomever it is
    read."""

    def __init__(self, text: Tensor, settings: Settings, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(text) - settings.context, (count, settings.batch), generator=generator)
        self.text, self.offsets = text, torch.arange(settings.context + 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        return self.text[self.starts[index][:, None] + self.offsets].long()


class Text(L.LightningDataModule):
    """The first nine tenths of the text to train on, the rest to validate on."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        text = torch.frombuffer(bytearray(read_text(settings.text) or b"\0"), dtype=torch.uint8)
        cut = len(text) * 9 // 10
        if len(text) - cut <= settings.context:
            raise SystemExit(
                f"text={settings.text!r} holds {len(text)} bytes; with context={settings.context} at least "
                f"{10 * (settings.context + 1)} are needed (a tenth of them is for validation)"
            )
        self.train, self.validation = text[:cut], text[cut:]

    def train_dataloader(self) -> Any:
        batches = self.settings.steps * self.settings.devices * self.settings.nodes  # Lightning shares them out
        windows = Windows(self.train, self.settings, batches, seed=self.settings.seed)
        return torch.utils.data.DataLoader(windows, batch_size=None)

    def val_dataloader(self) -> Any:
        windows = Windows(self.validation, self.settings, self.settings.validation_batches, seed=0)
        return torch.utils.data.DataLoader(windows, batch_size=None)


# ---------------------------------------------------------------------------------------------------------------------
# Model


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021): turns the pairs of ``x [..., context, channels]`` by angles that grow with
    the position, so that a product of two of them depends on their distance."""
    frequency = 10_000 ** -torch.linspace(0, 1, x.shape[-1] // 2, device=x.device)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)
    return turned.to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, context, width]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))  # bounded attention scores allow a higher learning rate
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(L.LightningModule):
    """A GPT on bytes. It does not know in which precision it is trained; only ``configure_optimizers`` asks."""

    def __init__(self, settings: Settings, low_bit: bool) -> None:
        super().__init__()
        self.settings, self.low_bit = settings, low_bit
        self.tokens = nn.Embedding(VOCABULARY, settings.width)
        self.blocks = nn.Sequential(*(Block(settings.width, settings.heads) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, VOCABULARY, bias=False)
        residual = 0.02 / math.sqrt(2 * settings.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual if name.endswith(("proj", "down")) else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.val_loss = MeanMetric()
        self.val_perplexity = Perplexity()

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, context] -> [batch, context, 256]
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens))))
        return logits.float()

    def training_step(self, windows: Tensor, index: int) -> Tensor:
        loss = F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, windows: Tensor, index: int) -> None:
        logits, targets = self(windows[:, :-1]), windows[:, 1:]
        self.val_loss(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        self.val_perplexity(logits, targets)
        self.log("val_loss", self.val_loss, prog_bar=True)
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def configure_optimizers(self) -> Any:
        s = self.settings
        groups = [
            {"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": s.weight_decay},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if self.low_bit:
            optimizer = lowbit_lightning.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.95), bits=8)
        else:
            optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.95), fused=True)

        def factor(step: int) -> float:  # linear warm-up, then half a cosine down to zero
            if step < s.warmup:
                return (step + 1) / s.warmup
            progress = (step - s.warmup) / max(1, s.steps - s.warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# ---------------------------------------------------------------------------------------------------------------------
# One run


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
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.train_losses.append(float(outputs["loss"]))  # waits for the device
        self.seconds.append(time.perf_counter() - self.started)
        products = [m.products.int8 for m in module.modules() if isinstance(m, layers.Int8Linear)]
        self.int8_layers = len(products)
        self.int8_calls += sum(map(len, products))  # three of each layer by default; every input here needs a gradient

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        self.int8_calls += self.int8_layers  # forward only

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.validations.append((trainer.global_step, float(metrics["val_loss"]), float(metrics["val_perplexity"])))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        states = trainer.optimizers[0].state.values()
        self.optimizer_bytes = sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))
        self.parameter_bytes = sum(getattr(p, "ds_tensor", p).nbytes for p in module.parameters())  # ZeRO-3's share


def strategy_of(settings: Settings) -> Any:
    """Strategies of ours would convert torch's optimizer, which the first run is to keep."""
    if not settings.strategy.startswith("lowbit"):
        return settings.strategy
    strategy: Any = StrategyRegistry.get(settings.strategy)
    strategy.optimizer_bits = None
    return strategy


def run(name: str, settings: Settings, text: Text, precision: Any, low_bit: bool = False) -> dict[str, Any]:
    """Trains once and returns what results.json says of it. ``precision``: a name that the Trainer knows, or a
    precision plugin; ``low_bit``: whether the optimizer keeps its state in 8 bits."""
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
    trainer.fit(GPT(settings, low_bit), text)
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


# ---------------------------------------------------------------------------------------------------------------------
# All runs


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
    lines = [f"{title:<24}" + "".join(f"{cell(run_):>16}" for run_ in runs) for title, cell in rows]
    lines += [f"  {name}: {count:,}" for name, count in low["kernels"].items()]
    lines.insert(len(rows), f"kernels that ran in {low['name']}:")
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
    if low["int8_layers"] == 0 or low["int8_matmuls"] != low["int8_matmuls_predicted"]:
        found.append(
            f"{low['int8_matmuls']} int8 matmuls ran in {low['int8_layers']} layers; arithmetic predicts "
            f"{low['int8_matmuls_predicted']} (3 per layer and training step, 1 per layer and validation batch)"
        )
    return found


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for run_, colour in zip(runs, ("tab:blue", "tab:orange", "tab:green"), strict=False):
        axes.plot(run_["train_losses"], color=colour, alpha=0.35, linewidth=1)
        steps, losses, _ = zip(*run_["validations"], strict=True)
        axes.plot(steps, losses, "o-", color=colour, label=f"{run_['name']}: validation {losses[-1]:.4f}")
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="GPT on bytes; faint: training loss")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def parse(arguments: list[str]) -> Settings:
    """Defaults, then ``--config``, then the command line; a name that is not in Settings is refused by name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, help="YAML file with any of the settings below")
    parser.add_argument("--full", action="store_true", help="a larger model: the settings of train_gpt_full.yaml")
    for field in dataclasses.fields(Settings):
        action = argparse.BooleanOptionalAction if field.type == "bool" else None
        options: dict[str, Any] = {"action": action} if action else {"metavar": str(field.type)}
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=f"default {field.default!r}", **options
        )
    given = vars(parser.parse_args(arguments))
    files = [HERE / "train_gpt_full.yaml"] if given.pop("full") else []
    config = given.pop("config")
    files += [config] if config else []
    try:
        merged = OmegaConf.structured(Settings)
        for source in [*(OmegaConf.load(file) for file in files), given]:
            merged = OmegaConf.merge(merged, source)
        settings = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, OSError) as error:
        raise SystemExit(f"{config or 'command line'}: {error}") from None
    assert isinstance(settings, Settings)
    settings.validate_every = min(settings.validate_every, settings.steps)
    if settings.steps % settings.validate_every:
        raise SystemExit(f"steps={settings.steps} has to be a multiple of validate_every={settings.validate_every}")
    if settings.width % settings.heads:
        raise SystemExit(f"width={settings.width} has to be a multiple of heads={settings.heads}")
    return settings


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
    failures = complaints(runs[0], runs[-1], settings.tolerance)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
