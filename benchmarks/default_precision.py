"""A training step by default, "int8-mixed", beside "32-true" and "bf16-mixed": a GPT, vision models, and
``nn.TransformerEncoder`` (6 layers of width 512, windows of 128 bytes).

    python benchmarks/default_precision.py [--device cuda] [--models gpt,vit,convnext] [--output FOLDER]

A step is forward, backward and ``torch.optim.AdamW(fused=True)``, by the precision plugin that a Trainer makes of the
string. All models learn from the same random batch. The default is right where "int8-mixed" is at least as fast as the
faster of the other two. As in a Trainer, layers that are slower in int8 become plain after the first step, which is not
timed (``swap="faster"``); with ``swap="all"`` they stay in int8. The last two rows force what ``autocast="auto"``
chooses from.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _common import HOW_TO_READ, Candidate, Report, measure, parser, skipped
from _encoder import Encoder
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit_lightning import Int8MixedPrecision

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from vision_models import ConvNeXt, ResNet, TransformerBlock

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

PRECISIONS: dict[str, dict[str, Any]] = {
    "32-true": {"precision": "32-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "int8-mixed": {"precision": "int8-mixed"},
    "- swap=all": {"plugins": Int8MixedPrecision(swap="all")},
    "- autocast=off": {"plugins": Int8MixedPrecision(autocast="off")},
    "- autocast=bf16": {"plugins": Int8MixedPrecision(autocast="bf16")},
}


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al., 2021), of the width of ViT-S; images are [batch, 3, 224, 224]."""

    def __init__(
        self, width: int = 384, layers: int = 12, heads: int = 6, patch: int = 16, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((224 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def gpt(device: str, *settings: str) -> tuple[nn.Module, Tensor, Tensor]:
    from gpt import GPT  # it wants omegaconf, which a machine for `make gpu` need not have
    from gpt_settings import parse

    chosen = parse(list(settings))
    windows = torch.randint(256, (chosen.batch, chosen.context + 1), device=device)
    return GPT(chosen, torch.optim.AdamW).to(device), windows[:, :-1], windows[:, 1:].flatten()


def vit(device: str, batch: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    images = torch.randn(batch, 3, 224, 224, device=device)
    return ViT().to(device), images, torch.randint(1000, (batch,), device=device)


def encoder(device: str, dropout: float = 0.1, batch: int = 16) -> tuple[nn.Module, Tensor, Tensor]:
    windows = torch.randint(256, (batch, 129), device=device)
    return Encoder(dropout=dropout).to(device), windows[:, :-1], windows[:, 1:].flatten()


def with_images(kind: Callable[[int], nn.Module], device: str, batch: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    model = kind(1000).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    return model, images, torch.randint(1000, (batch,), device=device)


MODELS: dict[str, Callable[[str], tuple[nn.Module, Tensor, Tensor]]] = {
    "gpt": gpt,
    "gpt-full": lambda device: gpt(device, "--full"),
    "gpt-narrow": lambda device: gpt(device, "--width=64", "--batch=2"),
    "vit": vit,
    "encoder": encoder,
    "encoder-no-dropout": partial(encoder, dropout=0.0),
    "convnext": partial(with_images, partial(ConvNeXt, width=96, depths=(3, 3, 9, 3))),
    "resnet18": partial(with_images, ResNet),
}


def step(name: str, options: dict[str, Any], device: str, chosen: dict[str, str]) -> Callable[[], None]:
    torch.manual_seed(0)
    model, inputs, targets = MODELS[name](device)
    trainer = L.Trainer(accelerator="gpu" if device == "cuda" else device, devices=1, logger=False, **options)
    plugin: Any = trainer.precision_plugin
    plugin.convert_module(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def run() -> None:
        with plugin.train_step_context():
            loss = F.cross_entropy(model(inputs).flatten(0, -2), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if hasattr(plugin, "report"):
        run()
        plugin.leave_slower_layers()
        chosen[str(next(iter(options.values())))] = str(plugin.report).replace("\n", ";")
    return run


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", default="gpt,vit", help=f"comma-separated, of {', '.join(MODELS)}")
    arguments = options.parse_args()
    report = Report("default precision", arguments)
    report.add(HOW_TO_READ, "")
    for name in arguments.models.split(","):
        reports: dict[str, str] = {}
        everyone = [
            Candidate(label, partial(step, name, given, arguments.device, reports))
            for label, given in PRECISIONS.items()
        ]
        running = measure(everyone, arguments)
        rivals = [c for c in running if c.name in ("32-true", "bf16-mixed")]
        faster, best = min(c.median for c in rivals), min(c.best for c in rivals)
        rows = [
            [
                *(c.name, f"{1e3 * c.median:.1f}", c.spread, f"{faster / c.median:.2f}x"),
                *(f"{1e3 * c.best:.1f}", f"{best / c.best:.2f}x"),
            ]
            for c in running
        ]
        report.add(
            f"## {name}",
            "",
            'The ratios are the time of the faster of "32-true" and "bf16-mixed" by that of the row.',
            "",
        )
        report.table(["a training step", "ms", "spread", "ratio", "best", "its ratio"], rows)
        report.add(*skipped(everyone), reports.get("int8-mixed", ""), "")
    report.save()


if __name__ == "__main__":
    main()
