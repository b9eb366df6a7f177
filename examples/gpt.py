"""The byte-level GPT of ``lowbit_lightning.experiments``, and the text it learns from, with the settings and the
optimizer of ``train_gpt.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpt_settings import Settings

from lowbit_lightning import experiments
from lowbit_lightning.experiments import WarmupCosine


class Text(experiments.Text):
    """The first nine tenths of the text to train on, the rest to validate on."""

    def __init__(self, settings: Settings) -> None:
        s = settings
        batches = s.steps * s.devices * s.nodes  # Lightning shares them out
        try:
            super().__init__(s.text, s.context, s.batch, batches, s.validation_batches, s.seed)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(str(error)) from None


class GPT(experiments.GPT):
    """``optimizer``: a class of AdamW, or what makes one from groups of parameters."""

    def __init__(self, settings: Settings, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__(settings.width, settings.layers, settings.heads)
        self.settings, self.make_optimizer = settings, optimizer

    def configure_optimizers(self) -> Any:
        s = self.settings
        groups = [
            {"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": s.weight_decay},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = self.make_optimizer(groups, lr=s.learning_rate, betas=(0.9, 0.95))
        schedule = WarmupCosine(optimizer, s.steps, s.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
