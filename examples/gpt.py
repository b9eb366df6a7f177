"""A byte-level GPT and the text it learns from, in plain Lightning: nothing here knows of low-bit arithmetic."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from gpt_settings import Settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity

VOCABULARY = 256  # bytes


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


class Windows(Dataset[Tensor]):
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

    def train_dataloader(self) -> DataLoader[Tensor]:
        batches = self.settings.steps * self.settings.devices * self.settings.nodes  # Lightning shares them out
        windows = Windows(self.train, self.settings, batches, seed=self.settings.seed)
        return DataLoader(windows, batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        windows = Windows(self.validation, self.settings, self.settings.validation_batches, seed=0)
        return DataLoader(windows, batch_size=None)


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
    """A GPT on bytes. ``optimizer``: a class of AdamW, or what makes one from groups of parameters."""

    def __init__(self, settings: Settings, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.settings, self.make_optimizer = settings, optimizer
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
        optimizer = self.make_optimizer(groups, lr=s.learning_rate, betas=(0.9, 0.95))

        def factor(step: int) -> float:  # linear warm-up, then half a cosine down to zero
            if step < s.warmup:
                return (step + 1) / s.warmup
            progress = (step - s.warmup) / max(1, s.steps - s.warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
